"""Train a GPT on Ray: data-parallel workers, early stopping, the best model in <run>/model.

python jobs/train.py                                     the quick start
python jobs/train.py data.source=book.txt name=book      your own text
python jobs/train.py --config configs/gpt2_124m.yaml compute.use_gpu=true
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", doc=__doc__ or ""))
