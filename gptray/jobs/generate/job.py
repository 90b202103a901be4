"""The generate job as the command line calls it: in the terminal, or in bulk on Ray."""

from __future__ import annotations

from typing import Any

from gptray.config import Config
from gptray.jobs.base import Job
from gptray.jobs.generate.run import generate, generation_plan
from gptray.jobs.generate.terminal import generate_here


def _run(config: Config) -> dict[str, Any]:
    if config.generate.input_path is None and config.sample.prompt is not None:
        return generate_here(config)
    return generate(config)


JOB = Job(lambda config: config, generation_plan, _run)
