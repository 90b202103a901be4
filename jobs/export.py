import sys

from gptray.doors import run

if __name__ == "__main__":
    sys.exit(run("export"))
