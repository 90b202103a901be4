"""The two JSON-lines files of a run that its watchers read.

`metrics.jsonl` has one row per logged step; `events.jsonl` tells what happened, in order: starts,
the base model's score, evaluations with their samples, checkpoints found damaged, failures, ends.
`gptray.training.journal` writes the metrics.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, cast

from gptray import __version__
from gptray.config import RunFailed
from gptray.storage.files import append, storing
from gptray.storage.stored import Unreadable, parse_json, read_bytes

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# The types of a row's fields: under "" those of every row, under an event's name those of its rows.
RowFields = Mapping[str, Mapping[str, type | tuple[type, ...]]]
METRIC_FIELDS: RowFields = {"": {"step": int, "train_loss": (int, float)}}
EVENT_FIELDS: RowFields = {
    "": {"event": str},
    "base": {"val_loss": (int, float)},
    "evaluated": {"step": int, "best": bool, "samples": list},
    "notice": {"message": str},
    "building": {"message": str},
    "landing": {"step": int, "back_to": int, "until": int, "message": str},
    "damaged": {"message": str},
    "failure": {"message": str},
    "waiting": {"message": str},
}


class TextScore(TypedDict):
    """The score of a text: nats per token, and bits per byte."""

    loss: float
    bpb: float


class MetricsRow(TypedDict, total=False):
    """A row of metrics.jsonl; losses are in nats per token.

    Fields from val_loss on are only there for evaluated steps, val_lost only if the tokenizer loses
    text, `also` only with evaluate.also. In a landing, steps continue to count, while epochs are
    those behind its weights. With train.ema, val_loss, val_ppl, val_bpb, gap and `also` are those
    of the better of the weights (own) and their average (ema).
    """

    step: Required[int]
    epoch: float
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_sec: float
    phase: Literal["stable", "landing"]  # with optim.schedule=wsd
    mfu: float
    val_loss: float
    val_ppl: float
    val_bpb: float
    gap: float
    val_lost: float
    val_loss_own: float
    val_loss_ema: float
    also: dict[str, TextScore]


class Event(TypedDict, total=False):
    """A line of events.jsonl; which fields it has depends on `event`."""

    event: Required[str]
    time: Required[float]
    step: int
    message: str  # notice, building, landing, damaged, failure, waiting
    back_to: int  # landing: the step from whose weights it starts
    until: int  # landing, and start within one: its last step
    stopped: Literal["max_steps", "patience", "non_finite"]  # end
    val_loss: float  # base: of the weights with which a run began, as are the next two
    val_bpb: float
    also: dict[str, TextScore]
    best: bool  # evaluated, as is the next
    samples: list[list[str]]  # pairs of a prompt and its continuation
    workers: int  # start, as are the others
    dtype: str
    backend: str  # native or torch
    chosen: str  # why that backend, in a sentence; empty if the config asked for it
    compiled: bool
    sharded: bool
    deterministic: bool
    parameters: int
    trained: int
    pid: int
    device: str
    processor: str
    versions: dict[str, str]
    loses: str
    teachers: dict[str, str]  # sha256 of the weights, by train.teachers
    text: dict[str, str]
    also_data: dict[str, str]  # the tokens of each text of evaluate.also, see TokenData.fingerprint
    warnings: list[str]


# Libraries that affect results.
LIBRARIES = ("torch", "ray", "transformers", "tokenizers")


def read_rows(path: Path, fields: RowFields | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without an incomplete last line, which a kill leaves.

    fields: the required fields; by default those for a file of that name. Blank lines, and the NULs
    that a crash of the machine leaves, are skipped. Raises RunFailed, naming the line, for a
    damaged row.
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


def read_metrics(run_dir: Path) -> list[MetricsRow]:
    """The rows of a run's metrics.jsonl; see `read_rows`."""
    return cast(list[MetricsRow], read_rows(run_dir / METRICS))


def read_events(run_dir: Path) -> list[Event]:
    """The lines of a run's events.jsonl; see `read_rows`."""
    return cast(list[Event], read_rows(run_dir / EVENTS))


def parse_row(line: bytes, fields: RowFields) -> dict[str, Any]:
    """Parse one line. Raises Unreadable if it lacks a field."""
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


def write_event(run_dir: Path, event: str, **fields: object) -> None:
    """Append one event to `events.jsonl` atomically. Raises RunFailed, such as for a full disk."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
    path = run_dir / EVENTS
    with storing(path):
        append(path, line.encode("utf-8", "backslashreplace") + b"\n", cut_torn=True)


def try_event(run_dir: Path, event: str, **fields: object) -> None:
    """Write an event if possible, for a failure that is reported elsewhere anyway."""
    with suppress(RunFailed):
        write_event(run_dir, event, **fields)


def versions() -> dict[str, str]:
    """The versions of gptray, Python and the installed LIBRARIES, by name."""
    found = {"gptray": __version__, "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def last_event(events: Sequence[Event], *kinds: str) -> Event | None:
    """The last event of one of these kinds; None if there is none."""
    return next((one for one in reversed(events) if one["event"] in kinds), None)


def curves(row: MetricsRow) -> dict[str, float]:
    """The numbers of a row to plot, by name: `val_loss`, `also/NAME/bpb` and so on."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if key == "also":
            for name, score in row["also"].items():
                numbers[f"also/{name}/loss"] = score["loss"]
                numbers[f"also/{name}/bpb"] = score["bpb"]
        elif key not in ("step", "phase"):
            numbers[key] = cast(float, value)
    return numbers


def teachers_of(events: Sequence[Event]) -> dict[str, str]:
    """The sha256 of the weights of a run's teachers, by name."""
    return next((one["teachers"] for one in reversed(events) if one.get("teachers")), {})


def seconds_trained(events: Sequence[Event]) -> float:
    """The sum of seconds from each start to the last event before the next start.

    If the clock was set back between two events, the time between them counts as 0.
    """
    begun = dropwhile(lambda event: event["event"] != "start", events)
    return sum(
        max(0.0, after["time"] - event["time"])
        for event, after in pairwise(begun)
        if after["event"] != "start"
    )
