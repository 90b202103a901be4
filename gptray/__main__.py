"""`python -m gptray JOB ...` is `gptray JOB ...`."""

import sys

from gptray.doors import main

if __name__ == "__main__":
    sys.exit(main())
