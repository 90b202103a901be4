"""Tune a GPT on Ray: trials of a search space, the worse ones cut early, the best settings kept.

python jobs/tune.py --config configs/overfitting_sweep.yaml data.source=book.txt name=book-sweep
python jobs/tune.py --config configs/overfitting_demo.yaml       a demonstration: what helps?
python jobs/train.py --config ~/gptray/book-sweep/best.yaml train.max_steps=4000    its winner
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    from gptray.jobs.tune.run import tune

    return tune(config)


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.tune.check import sweep_plan

    return sweep_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="tune", doc=__doc__ or "", plan=plan))
