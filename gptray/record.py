"""The two JSON-lines files of a run that whoever watches it reads.

`metrics.jsonl` has one row per logged step; `events.jsonl` tells what happened, in order: starts,
evaluations with their samples, checkpoints found damaged, failures, ends.
`gptray.training.journal` writes the metrics.
"""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptray import __version__
from gptray.config import RunFailed
from gptray.files import append, storing

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# What a result depends on, besides gptray itself.
LIBRARIES = ("torch", "ray", "transformers", "tokenizers")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a torn last line, left by a kill, is not a row yet."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_event(run_dir: Path, event: str, **fields: Any) -> None:
    """Append one event to `events.jsonl`, whole or not at all.

    Raises:
        RunFailed: the disk is full or cannot be written.
    """
    line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
    path = run_dir / EVENTS
    with storing(path):
        append(path, line.encode("utf-8", "backslashreplace") + b"\n", cut_torn=True)


def try_event(run_dir: Path, event: str, **fields: Any) -> None:
    """Write an event of a failure that is told elsewhere, whether the disk takes it or not."""
    with suppress(RunFailed):
        write_event(run_dir, event, **fields)


def versions() -> dict[str, str]:
    """The versions of gptray, Python and the libraries that are installed, by name."""
    found = {"gptray": __version__, "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
