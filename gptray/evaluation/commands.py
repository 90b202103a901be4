"""Commands that work when they are typed back, for whoever reads a report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptray.config import Config, UserError, override
from gptray.model.example import load_example

# For a model that names none of its own.
PROMPT = "Once upon a time"


def job_command(job: str, *words: str) -> str:
    """The command of a job, quoted for a shell."""
    return shlex.join(["python", f"jobs/{job}.py", *words])


def evaluate_command(folder: Path) -> str:
    """What measures a run's best model."""
    return job_command("evaluate", f"evaluate.model={folder.resolve()}")


def next_commands(folder: Path, *, is_evaluated: bool) -> list[str]:
    """What to do with the model of a run that has ended."""
    model = str(folder.resolve())
    prompt = json.dumps(load_example(folder / "model") or PROMPT, ensure_ascii=False)
    measure = [] if is_evaluated else [evaluate_command(folder)]
    return [
        *measure,
        job_command("generate", f"generate.model={model}", f"sample.prompt={prompt}"),
        job_command("serve", f"serve.model={model}"),
    ]


def train_command(
    folder: Path, config: Config, changes: Mapping[str, Any], *, resumes: bool
) -> str | None:
    """What trains a run on with these keys changed, or `resumes` not: a new run beside it.

    None where the keys do not go together with the others of the run.
    """
    try:
        override(config, changes)
    except UserError:
        return None
    folder = folder.resolve()
    words = [f"{key}={_word(value)}" for key, value in changes.items()]
    name = [] if resumes else [f"name={_free_name(folder)}"]
    return job_command("train", "--config", str(folder / "config.yaml"), *name, *words)


def _free_name(folder: Path) -> str:
    number = 2
    while (folder.parent / f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
