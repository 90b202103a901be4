"""Continue prompts: a file of them to Parquet on Ray, or a few right here in the terminal.

python jobs/generate.py 'sample.prompt=Once upon a time'
python jobs/generate.py generate.input_path=prompts.jsonl generate.output_path=out
python jobs/generate.py ... generate.model=gpt2 generate.num_workers=4
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("generate", doc=__doc__ or ""))
