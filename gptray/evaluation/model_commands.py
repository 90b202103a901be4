"""Commands that use or improve a model, ready for a reader to paste."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from gptray.commands import job_command
from gptray.config import Config, UserError, override
from gptray.model.example import FALLBACK, Example, load_example
from gptray.storage.files import is_uri


def model_commands(
    folder: Path, name: str | None = None, command: Callable[..., str] = job_command
) -> dict[str, str]:
    """The commands that evaluate, generate with, and serve a model, by job.

    folder: a run's, a sweep's or the model's own.
    name: how the commands refer to it; by default by its folder.
    command: formats a job and its arguments as a command, see `gptray.commands`.
    """
    name = name or str(folder.resolve())
    return {
        "evaluate": command("evaluate", f"evaluate.model={name}"),
        "generate": command("generate", f"generate.model={name}", *_prompt_words(folder)),
        "serve": command("serve", f"serve.model={name}"),
    }


def home_of(config: Config) -> str | None:
    """The URI of a run whose storage is an object store; None for any other run."""
    return f"{config.storage_path}/{config.name}" if is_uri(config.storage_path) else None


def _prompt_words(folder: Path) -> list[str]:
    """`sample.prompt=` with a prompt that suits the model; quoted only if YAML needs it."""
    example = load_example(folder / "model") or load_example(folder) or Example(FALLBACK)
    prompt = example.prompt
    is_plain = prompt.isprintable() and prompt[0] not in "'\"[~" and prompt.lower() != "null"
    word = f"sample.prompt={prompt if is_plain else json.dumps(prompt, ensure_ascii=False)}"
    return [word, "sample.parse_special=true"] if example.parse_special else [word]


def train_command(
    folder: Path, config: Config, changes: Mapping[str, object], *, resumes: bool
) -> str | None:
    """The command that trains with these changes, resuming the same run or starting a new one.

    None if the changed keys contradict others of the run.
    """
    try:
        override(config, changes)
    except UserError:
        return None
    folder = folder.resolve()
    words = [f"{key}={_word(value)}" for key, value in changes.items()]
    name = [] if resumes else [f"name={_free_name(folder)}"]
    home = home_of(config) or folder
    return job_command("train", "--config", f"{home}/config.yaml", *name, *words)


def _free_name(folder: Path) -> str:
    number = 2
    while (folder.parent / f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
