"""The two JSON-lines files of a run that its watchers read.

`metrics.jsonl` has one row per logged step; `events.jsonl` tells what happened, in order: starts,
evaluations with their samples, checkpoints found damaged, failures, ends.
`gptray.training.journal` writes the metrics.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptray import __version__
from gptray.config import RunFailed
from gptray.files import append, storing
from gptray.stored import Unreadable, parse_json, read_bytes

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# Types of a row's fields by name: of every row under "", of an event's rows under its name.
RowFields = Mapping[str, Mapping[str, Any]]
METRIC_FIELDS: RowFields = {"": {"step": int, "train_loss": (int, float)}}
EVENT_FIELDS: RowFields = {
    "": {"event": str},
    "evaluated": {"step": int, "best": bool, "samples": list},
    "notice": {"message": str},
    "damaged": {"message": str},
    "failure": {"message": str},
    "waiting": {"message": str},
}
# What a result depends on besides gptray itself.
LIBRARIES = ("torch", "ray", "transformers", "tokenizers")


def read_rows(path: Path, fields: RowFields | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a torn last line, which a kill leaves.

    fields: what each row must have; by default, what a file of that name must have. Blank lines,
    and the NULs that a crash of the machine leaves, are skipped.

    Raises:
        RunFailed: a row is damaged; names its line.
    """
    fields = fields or (METRIC_FIELDS if path.name == METRICS else EVENT_FIELDS)
    try:
        lines = read_bytes(path, most=None).split(b"\n")
    except FileNotFoundError:
        return []
    except Unreadable as error:
        raise RunFailed(f"{path} cannot be read: {error}; restore it from a copy") from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip(b"\0\r\t "):
            try:
                rows.append(parse_row(line, fields))
            except Unreadable as error:
                raise RunFailed(
                    f"{path}:{number}: the line is damaged: {error}; restore the file from a copy, "
                    "or delete the line"
                ) from None
    return rows


def parse_row(line: bytes, fields: RowFields) -> dict[str, Any]:
    """The row in a line of JSON. Raises Unreadable if it lacks one of its fields."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise Unreadable("not a JSON object")
    event = row.get("event")
    own = fields.get(event, {}) if isinstance(event, str) else {}
    for key, kind in {**fields.get("", {}), **own}.items():
        value = row.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Unreadable(f"{key} is missing" if value is None else f"{key}={value!r:.40}")
    return row


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


def seconds_trained(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from each start to the last event before the next start, added up."""
    total, began, latest = 0.0, None, 0.0
    for event in events:
        if event["event"] == "start":
            total += latest - began if began is not None else 0.0
            began = event["time"]
        latest = event["time"]
    return total + (latest - began if began is not None else 0.0)
