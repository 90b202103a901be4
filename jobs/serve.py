"""Serve a model over HTTP, on Ray Serve, to any client that speaks OpenAI's completions.

python jobs/serve.py                                     the newest run, http://127.0.0.1:8000
python jobs/serve.py serve.model=<run, model folder or hub id> serve.port=8080
python jobs/serve.py ... serve.num_replicas=2 serve.api_key_file=keys.txt serve.host=0.0.0.0
"""

from __future__ import annotations

import sys

from gptray.cli import line_printer, run_job
from gptray.config import Config


def job(config: Config) -> None:
    from gptray.jobs.serve.run import serve

    serve(config, answers=line_printer())


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.serve.check import serving_plan

    return serving_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(job, name="serve", doc=__doc__ or "", plan=plan))
