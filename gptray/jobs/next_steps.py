"""What a job logs at its end: its settings, and the commands to run next."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptray.commands import typed
from gptray.config import Config, differences
from gptray.config.keys import shown
from gptray.evaluation.model_commands import model_commands
from gptray.gguf.conversion import is_gguf
from gptray.jobs.adapters import adapter_arguments
from gptray.jobs.folders.resuming import command
from gptray.jobs.folders.run_folder import run_place
from gptray.jobs.models import has_model, storage_of
from gptray.reports.run.diagnosis import diagnose
from gptray.reports.run.sentence import sentence
from gptray.storage.files import expanded, is_uri
from gptray.storage.record import read_events, read_metrics

log = logging.getLogger("gptray")

_DEFAULTS = Config()


def tell(commands: Sequence[str], *, settings: str = "") -> None:
    """Log a run's settings in one line, if there are any, and the commands to run next."""
    if settings:
        log.info("settings: %s", settings)
    log.info("next:\n%s", "\n".join(f"  {command}" for command in commands))


def tell_run(config: Config, folder: Path) -> None:
    """Log a finished run's diagnosis, its settings, and the commands to run next."""
    rows, events = read_metrics(folder), read_events(folder)
    diagnosis = diagnose(rows, config, events)
    log.info("%s", sentence(diagnosis, config))
    uses = of_model(folder, run_place(config))
    commands = [uses["generate"], uses["evaluate"]]
    if diagnosis.verdict == "falling" and diagnosis.ended == "max_steps" and not diagnosis.landed:
        longer = f"train.max_steps={2 * diagnosis.last_step}"
        commands = [command("train", config, folder, longer), uses["generate"]]
    tell(commands, settings=settings_of(differing(config)))


@contextmanager
def resumable(
    folder: Path, again: Callable[[], str], *, begun: Path, steps: int = 0, place: str | None = None
) -> Iterator[None]:
    """If the block is interrupted, log where its results are and the command that resumes it.

    again: returns that command. begun: a path that exists once there is something to resume.
    steps: how many the run is to make. place: where the results are, if not in `folder`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's SIGTERM handler exits
        if begun.exists():
            rows = read_metrics(folder)
            at = f" after step {rows[-1]['step']:,} of {steps:,}" if rows else ""
            log.info("stopped%s; results so far: %s\nresume:\n  %s", at, place or folder, again())
        raise


def of_model(
    folder: Path, source: str | None = None, *, adapter: str | None = None
) -> dict[str, str]:
    """The commands that use the model of a run, a sweep or a model folder, by job.

    source: the model as given; commands use it if it is a URI or a GGUF file. adapter: the folder
    of an adapter to use with it.
    """
    again = source and (is_uri(source) or is_gguf(expanded(source)))
    name = source if again else short_name(folder)
    uses = model_commands(folder, name, typed)
    if adapter is None:
        return uses
    return {
        job: f"{uses[job]} {shlex.quote(word)}" for job, word in adapter_arguments(adapter).items()
    }


def short_name(folder: Path) -> str:
    """A run's name in commands: its bare name if that finds it, otherwise its folder."""
    is_enough = folder.parent == storage_of(_DEFAULTS) and not has_model(Path(folder.name))
    return folder.name if is_enough else str(folder)


def settings_of(values: Mapping[str, object]) -> str:
    """Keys and values in one line."""
    words = (f"{key}={shown(value).strip(chr(39))}" for key, value in values.items())
    return " ".join(words) or "the defaults"


def differing(config: Config) -> dict[str, object]:
    """The keys that differ from the defaults, except those that say where the run is kept."""
    hidden = {"name", "storage_path", "tune.space"}
    if config.data.tokenizer == "bpe" and config.model.init_from is None:
        hidden.add("data.tokenizer")  # what null means here
    return {key: value for key, value in differences(config).items() if key not in hidden}
