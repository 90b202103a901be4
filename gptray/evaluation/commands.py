"""The commands in a report: each works when a reader types it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptray.commands import job_command
from gptray.config import Config, UserError, override
from gptray.model.example import FALLBACK, load_example


def evaluate_command(folder: Path) -> str:
    """The command that evaluates a run's best model."""
    return job_command("evaluate", f"evaluate.model={folder.resolve()}")


def next_commands(folder: Path, *, is_evaluated: bool) -> list[str]:
    """The commands that use the model of a run that has ended."""
    model = str(folder.resolve())
    prompt = json.dumps(load_example(folder / "model") or FALLBACK, ensure_ascii=False)
    measure = [] if is_evaluated else [evaluate_command(folder)]
    return [
        *measure,
        job_command("generate", f"generate.model={model}", f"sample.prompt={prompt}"),
        job_command("serve", f"serve.model={model}"),
    ]


def train_command(
    folder: Path, config: Config, changes: Mapping[str, Any], *, resumes: bool
) -> str | None:
    """The command that trains with these keys changed: the same run longer, or a new one beside it.

    None if the changed keys contradict others of the run.
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
