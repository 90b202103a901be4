"""List the runs and sweeps in storage_path, newest first: state, verdict, losses, next command.

python jobs/runs.py
python jobs/runs.py storage_path=/mnt/runs
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("runs", doc=__doc__ or ""))
