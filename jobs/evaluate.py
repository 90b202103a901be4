"""Evaluate a model: losses over whole splits, perplexity, bits per byte, BLEU, memorisation.

python jobs/evaluate.py name=book                          a run, on its own text
python jobs/evaluate.py evaluate.model=gpt2 data.source=book.txt
python jobs/evaluate.py name=book evaluate.source=other.txt evaluate.stride=64
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", doc=__doc__ or ""))
