"""What comes next: the commands that a job names at its end, each of which works when typed."""

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
from gptray.record import EVENTS, METRICS, read_rows
from gptray.runners.models import CONFIG, has_model, storage_of
from gptray.runners.resuming import command

log = logging.getLogger("gptray")

_DEFAULTS = Config()
# Characters of a prompt in a command.
_LONGEST = 40


def tell(commands: Sequence[str], *, settings: Mapping[str, Any] | None = None) -> None:
    """Say a run's settings in one line, and what to type next."""
    if settings is not None:
        log.info("settings: %s", settings_of(settings))
    log.info("next:\n%s", "\n".join(f"  {command}" for command in commands))


def tell_run(config: Config, folder: Path) -> None:
    """Say what a run that has ended has come to, its settings, and what to type next."""
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
    """Where the block is interrupted, say where the run or sweep is and what resumes it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's SIGTERM handler exits
        if (folder / CONFIG).is_file():
            rows = read_rows(folder / METRICS)
            at = f" after step {rows[-1]['step']:,} of {config.train.max_steps:,}" if rows else ""
            log.info("stopped%s: %s\nresume:\n  %s", at, folder, command(job, config, folder))
        raise


def of_model(folder: Path, *, prompt: str | None = None) -> list[str]:
    """What to do with the model of a run or sweep: read what it writes, serve it."""
    written = prompt or prompt_of(folder)
    return [
        typed("generate", named("generate.model", folder), f"sample.prompt={written}"),
        typed("serve", named("serve.model", folder)),
    ]


def named(key: str, folder: Path) -> str:
    """`key=` and the run: by its name where that alone finds it, else by its folder."""
    is_plain = folder.parent == storage_of(_DEFAULTS) and not has_model(Path(folder.name))
    return f"{key}={folder.name if is_plain else folder}"


def settings_of(values: Mapping[str, Any]) -> str:
    """Keys and their values in one line."""
    words = (f"{key}={shown(value).strip(chr(39))}" for key, value in values.items())
    return " ".join(words) or "the defaults"


def differing(config: Config) -> dict[str, Any]:
    """The keys that differ from the defaults, but for where the run is."""
    hidden = ("name", "storage_path", "tune.space")
    return {key: value for key, value in differences(config).items() if key not in hidden}


def prompt_of(folder: Path) -> str:
    """A prompt that the run itself has continued, if it can stand in a command."""
    for event in reversed(read_rows(folder / EVENTS)):
        for prompt, _ in event.get("samples") or ():
            if prompt.isprintable() and len(prompt) <= _LONGEST and prompt[:1] not in "'\"[~":
                return str(prompt)
    return "Once upon a time"
