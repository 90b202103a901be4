"""Small generate jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptray.config import Config, load_config
from gptray.jobs.base import Plan
from gptray.jobs.generate.check import check, plan
from gptray.jobs.generate.run import run


def config_of(model_dir: Path, prompts: Path, output: Path, *overrides: str) -> Config:
    defaults = {
        "generate.model": model_dir,
        "generate.input_path": prompts,
        "generate.output_path": output,
        "generate.rows_per_file": 8,
        "generate.max_batch_size": 6,
        "generate.precision": "fp32",
        "sample.max_new_tokens": 12,
        "sample.utf8": False,  # as the reference draws
    }
    values = {key: str(value) for key, value in defaults.items()}
    values |= dict(pair.split("=", 1) for pair in overrides)
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def generate(config: Config) -> dict[str, Any]:
    """Run the job."""
    return run(check(config))


def planned(config: Config) -> Plan:
    """What the job's dry run says."""
    return plan(check(config))
