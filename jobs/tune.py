"""Tune a GPT on Ray: trials of a search space, the worse ones cut early, the best settings kept.

python jobs/tune.py --config configs/overfitting_sweep.yaml data.source=book.txt name=book-sweep
python jobs/tune.py --config configs/overfitting_demo.yaml       a demonstration: what helps?
python jobs/train.py --config ~/gptray/book-sweep/best.yaml train.max_steps=4000    its winner
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("tune", doc=__doc__ or ""))
