"""Prepare text for training: a tokenizer, token shards and a manifest, built on Ray Data.

  python jobs/prepare.py                                        the builtin text
  python jobs/prepare.py data.source=books/ data.split=80:10:10   a folder of your own
  python jobs/prepare.py data.source='s3://bucket/*.jsonl' data.text_column=body

Training does this by itself if it was not done; the same text and settings are prepared only once.
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    from gptray.jobs.prepare.plan import prepare_and_count

    return prepare_and_count(config)


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.prepare.plan import preparation_plan

    return preparation_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="prepare", doc=__doc__ or "", plan=plan))
