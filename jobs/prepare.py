"""Prepare text for training: a tokenizer, token shards and a manifest, built on Ray Data.

  python jobs/prepare.py                                        the builtin text
  python jobs/prepare.py data.source=books/ data.split=80:10:10   a folder of your own
  python jobs/prepare.py data.source='s3://bucket/*.jsonl' data.text_column=body

Training does this by itself if it was not done; the same text and settings are prepared only once.
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("prepare", doc=__doc__ or ""))
