"""Continue prompts: a file of them to Parquet on Ray, or a few right here in the terminal.

python jobs/generate.py 'sample.prompt=Once upon a time'
python jobs/generate.py generate.input_path=prompts.jsonl generate.output_path=out
python jobs/generate.py ... generate.model=gpt2 generate.num_workers=4
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    if config.generate.input_path is None and config.sample.prompt is not None:
        from gptray.jobs.generate.terminal import generate_here

        return generate_here(config)
    from gptray.jobs.generate.run import generate

    return generate(config)


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.generate.run import generation_plan

    return generation_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="generate", doc=__doc__ or "", plan=plan))
