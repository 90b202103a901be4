"""The command line that all jobs share: arguments in, exit code and one JSON line out.

Imports neither torch nor Ray, so that a wrong key is refused at once. `gptray.jobs.base.Job` says
what a job does, `gptray.config` which keys there are.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gptray.commands import job_command
from gptray.config import (
    Config,
    ConfigError,
    RunFailed,
    UserError,
    differences,
    dump_differences,
    load_config,
)
from gptray.config.errors import missing_module
from gptray.config.help import help_text
from gptray.config.keys import field_specs
from gptray.config.suggest import nearest, nearest_keys
from gptray.jobs.base import Job, Plan, find_job
from gptray.jobs.progress.doing import doing
from gptray.process_setup import set_up_process
from gptray.signals import STOP_S, interrupting
from gptray.standard_output import Unread, json_line, redirect_to_null, write_out
from gptray.storage.files import cannot_write, is_storage, is_uri
from gptray.storage.node_cache import copied
from gptray.storage.path_mistakes import path_mistake
from gptray.visible import visible

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
FLAGS = ("--config", "--dry-run", "--verbose", "--help")
# The options without a value, and the fields of `Arguments` that they set.
SWITCHES = {"--dry-run": "dry_run", "--verbose": "verbose", "--help": "help", "-h": "help"}


@dataclass
class Arguments:
    """The parsed command line; `problems` are about flags, and values are not checked yet."""

    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    verbose: bool = False
    help: bool = False
    problems: list[str] = field(default_factory=list)


def run_job(
    name: str, *, doc: str, argv: Sequence[str] | None = None, job: Job[Any] | None = None
) -> int:
    """Run a job from the command line and return its exit code.

    UserError means exit code 2, RunFailed and any other exception 1, a signal to stop 130.

    doc: the text above the keys in --help.
    argv: None means the process's own arguments; the process then ends with the job.
    job: None means the job of that name, see `find_job`.
    """
    if argv is None:
        set_up_process()
    code = _run(name, doc, argv, job)
    if argv is None:
        if code in (FAILED, INTERRUPTED):
            _end_process(code)  # threads may still be waiting for a Ray that is gone
        gc.freeze()  # spares a collection at exit: half a second with torch's objects
    return code


def _run(name: str, doc: str, argv: Sequence[str] | None, job: Job[Any] | None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    _escape_unencodable()
    try:
        if arguments.help:
            write_out(help_text(Config, command=job_command(name), doc=doc) + "\n")
            return DONE
        config = _config(arguments)
        if arguments.dry_run:
            job = job or find_job(name)
            write_out(_plan_text(config, job.plan(job.check(config))))
            return DONE
        _log_to_stderr(verbose=arguments.verbose)
        with interrupting(lambda failure, is_again: _end_at_once(name, failure, is_again)):
            job = job or find_job(name)
            with doing("checking what the job needs"):
                checked = job.check(config)
            result = job.run(checked)
        if result is not None:
            write_out(json_line(result))
        return DONE
    except ConfigError as error:
        _say(f"{error}\n{name}: nothing was started; --help lists every key")
        return MISTAKE
    except UserError as error:
        _say(f"{name}: {error}")
        return MISTAKE
    except RunFailed as error:
        _say(f"{name}: {error}")
        return FAILED
    except (KeyboardInterrupt, SystemExit):
        # SystemExit comes from Ray's own SIGTERM handler; a job never raises it.
        _say(f"{name}: interrupted")
        return INTERRUPTED
    except Unread:
        return DONE
    except OSError as error:
        if mistake := path_mistake(error):
            _say(f"{name}: {mistake}")
            return MISTAKE
        told = f"{name}: {cannot_write(Path.cwd(), error)}" if is_storage(error) else None
        _say(told or traceback.format_exc().rstrip("\n"))
        return FAILED
    except Exception as error:
        missing = missing_module(error)
        _say(f"{name}: {missing}" if missing else traceback.format_exc().rstrip("\n"))
        return MISTAKE if missing else FAILED


def _escape_unencodable() -> None:
    """Print characters that the output's encoding lacks as \\uXXXX."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Split a command line into flags and section.field=value overrides."""
    arguments = Arguments()
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            arguments.overrides.append(word)
        elif flag == "--config":
            if not equals:
                value = words.pop(0) if words and not words[0].startswith("-") else ""
            _take_config(arguments, value)
        elif flag in SWITCHES and equals:
            arguments.problems.append(f"command line: {flag} takes no value")
        elif flag in SWITCHES:
            setattr(arguments, SWITCHES[flag], True)
        else:
            if not equals and words and "=" not in words[0] and not words[0].startswith("-"):
                value = words.pop(0)
            arguments.problems.append(f"command line: {_unknown_flag(flag, value)}")
    return arguments


def _take_config(arguments: Arguments, path: str) -> None:
    if not path:
        arguments.problems.append("command line: --config needs a file, such as --config my.yaml")
    elif arguments.config is not None:
        arguments.problems.append("command line: --config is given twice; only one is allowed")
    else:
        arguments.config = path


def _unknown_flag(flag: str, value: str) -> str:
    """The message about an unknown flag, with what to write instead."""
    keys = nearest_keys(flag.lstrip("-"), list(field_specs(Config)))
    close = nearest(flag, FLAGS, cutoff=0.75)
    if close:
        return f"unknown option {flag}; did you mean {close}?"
    if keys:
        right = " or ".join(f"{key}={value or '...'}" for key in keys)
        return f"unknown option {flag}; keys have no dashes: write {right}"
    return f"unknown option {flag}; options are {', '.join(FLAGS)}"


def _config(arguments: Arguments) -> Config:
    """Load the config. Raises ConfigError with all mistakes in flags, file and values."""
    problems = arguments.problems
    try:
        file = arguments.config
        # A file that a URI names is copied to this node.
        file = str(copied(file)) if file and is_uri(file) else file
        config = load_config(file, arguments.overrides)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _plan_text(config: Config, rows: Plan) -> str:
    """The plan as YAML comments, the keys that differ from the defaults, and the JSON line.

    All but the last line form a config file.
    """
    own, of_all = dump_differences(config), len(field_specs(Config))
    differing = len(differences(config))
    others = f"# {of_all - differing} of {of_all} keys have their defaults (--help lists them)"
    last = json_line({"dry_run": True, "plan": dict(rows)})
    return "\n".join([*_comments(rows), *own.splitlines(), others, last])


def _comments(rows: Plan) -> Iterator[str]:
    """Yield each fact's label and value, wrapped to the terminal's width; paths stay whole."""
    label_width = max((len(label) for label, _ in rows), default=0)
    width = shutil.get_terminal_size((100, 24)).columns
    for label, value in rows:
        yield from textwrap.wrap(
            visible(" ".join(value.split())),
            max(width, label_width + 24),
            initial_indent=f"# {label:{label_width}}  ",
            subsequent_indent="#" + " " * (label_width + 3),
            break_long_words=False,
            break_on_hyphens=False,
        )


def _say(message: str) -> None:
    """Print to stderr; if that fails, the exit code must do."""
    try:
        print(visible(message), file=sys.stderr, flush=True)
    except OSError:
        redirect_to_null(sys.stderr)


class _StderrHandler(logging.Handler):
    """Logs plain lines to the current sys.stderr, so that a live bar can stay below them.

    A line is the message, with the level in front for warnings and errors.
    """

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(visible(self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _log_to_stderr(*, verbose: bool) -> None:
    logger = logging.getLogger("gptray")
    logger.handlers.clear()
    logger.addHandler(_StderrHandler())
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def _end_at_once(name: str, failure: str | None, is_again: bool) -> NoReturn:
    """End a job that does not stop by itself; its own Ray dies with the process."""
    late = "" if is_again else f"; killed, because it had not stopped after {STOP_S:.0f} s"
    _say(f"{name}: {failure or 'interrupted'}{late}")
    _end_process(FAILED if failure else INTERRUPTED)


def _end_process(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
