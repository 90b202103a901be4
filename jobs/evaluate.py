"""Evaluate a model: losses over whole splits, perplexity, bits per byte, BLEU, memorisation.

python jobs/evaluate.py name=book                          a run, on its own text
python jobs/evaluate.py evaluate.model=gpt2 data.source=book.txt
python jobs/evaluate.py name=book evaluate.source=other.txt evaluate.stride=64
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    from gptray.jobs.evaluate.run import evaluate

    return evaluate(config)


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.evaluate.run import evaluation_plan

    return evaluation_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="evaluate", doc=__doc__ or "", plan=plan))
