import sys

from gptray.entry_points import run

if __name__ == "__main__":
    sys.exit(run("train"))
