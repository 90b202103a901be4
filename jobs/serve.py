import sys

from gptray.jobs.doors import run

if __name__ == "__main__":
    sys.exit(run("serve"))
