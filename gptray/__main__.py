"""`python -m gptray JOB ...` is `gptray JOB ...`."""

import sys

from gptray.entry_points import main

if __name__ == "__main__":
    sys.exit(main())
