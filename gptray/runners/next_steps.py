"""What a job says at its end: its settings, and the commands that come next."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptray.commands import typed
from gptray.config import Config, differences
from gptray.evaluation.diagnosis import diagnose
from gptray.evaluation.sentence import sentence
from gptray.fields import shown
from gptray.model.example import FALLBACK
from gptray.record import EVENTS, METRICS, read_rows
from gptray.runners.models import CONFIG, has_model, storage_of
from gptray.runners.resuming import command

log = logging.getLogger("gptray")

_DEFAULTS = Config()
# Characters of a prompt in a command, at most.
_LONGEST = 40


def tell(commands: Sequence[str], *, settings: Mapping[str, Any] | None = None) -> None:
    """Log a run's settings in one line, and the commands that come next."""
    if settings is not None:
        log.info("settings: %s", settings_of(settings))
    log.info("next:\n%s", "\n".join(f"  {command}" for command in commands))


def tell_run(config: Config, folder: Path) -> None:
    """Log a finished run's diagnosis, its settings, and the commands that come next."""
    rows, events = read_rows(folder / METRICS), read_rows(folder / EVENTS)
    diagnosis = diagnose(rows, config, events)
    log.info("%s", sentence(diagnosis, config))
    commands = [of_model(folder)[0], typed("evaluate", named("evaluate.model", folder))]
    if diagnosis.verdict == "falling" and diagnosis.ended == "max_steps":
        longer = f"train.max_steps={2 * diagnosis.last_step}"
        commands = [command("train", config, folder, longer), commands[0]]
    tell(commands, settings=differing(config))


@contextmanager
def resumable(job: str, config: Config, folder: Path) -> Iterator[None]:
    """If the block is interrupted, log where the run or sweep is and what resumes it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's SIGTERM handler exits
        if (folder / CONFIG).is_file():
            rows = read_rows(folder / METRICS)
            at = f" after step {rows[-1]['step']:,} of {config.train.max_steps:,}" if rows else ""
            log.info("stopped%s: %s\nresume:\n  %s", at, folder, command(job, config, folder))
        raise


def of_model(folder: Path, *, prompt: str | None = None) -> list[str]:
    """The commands that generate with, and serve, the model of a run or sweep."""
    prompt = prompt or prompt_of(folder)
    return [
        typed("generate", named("generate.model", folder), f"sample.prompt={prompt}"),
        typed("serve", named("serve.model", folder)),
    ]


def named(key: str, folder: Path) -> str:
    """`key=` and the run: its name if that is enough to find it, else its folder."""
    is_plain = folder.parent == storage_of(_DEFAULTS) and not has_model(Path(folder.name))
    return f"{key}={folder.name if is_plain else folder}"


def settings_of(values: Mapping[str, Any]) -> str:
    """Keys and values in one line."""
    words = (f"{key}={shown(value).strip(chr(39))}" for key, value in values.items())
    return " ".join(words) or "the defaults"


def differing(config: Config) -> dict[str, Any]:
    """The keys that differ from the defaults, except where the run is kept."""
    hidden = ("name", "storage_path", "tune.space")
    return {key: value for key, value in differences(config).items() if key not in hidden}


def prompt_of(folder: Path) -> str:
    """A prompt that the run itself has continued and that needs no quoting within a value."""
    for event in reversed(read_rows(folder / EVENTS)):
        for prompt, _ in event.get("samples") or ():
            if prompt.isprintable() and len(prompt) <= _LONGEST and prompt[:1] not in "'\"[~":
                return str(prompt)
    return FALLBACK
