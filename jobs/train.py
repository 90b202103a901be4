"""Train a GPT on Ray: data-parallel workers, early stopping, the best model in <run>/model.

python jobs/train.py                                     the quick start
python jobs/train.py data.source=book.txt name=book      your own text
python jobs/train.py --config configs/gpt2_124m.yaml compute.use_gpu=true
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    from gptray.jobs.train.run import train

    return train(config)


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.train.plan import training_plan

    return training_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="train", doc=__doc__ or "", plan=plan))
