"""A run's TensorBoard event files, written by the training thread.

tensorboardX's own writer has a thread and a queue: on a full disk the thread dies, and adding to
the queue then blocks forever. So only its protobuf messages are used here.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar, text

from gptray.storage.files import append, storing

# The first record of an event file.
VERSION = "brain.Event:2"
# Prefixes of metrics that evaluations produce.
_VAL_PREFIXES = ("val_", "gap", "also/")


class Boards:
    """A run's curves, with training and validation loss in one chart.

    TensorBoard draws one chart for each tag, with a colour for each folder. The folders are
    `<name>/train` and `<name>/val`, and both losses have the tag `loss`.
    """

    def __init__(self, folder: Path, name: str, *, step: int) -> None:
        self._train = Board(folder / name / "train", step=step)
        self._val = Board(folder / name / "val", step=step)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the curve of each metric in a row."""
        for key, value in values.items():
            if key.startswith(_VAL_PREFIXES):
                self._val.add(step, scalar(key.removeprefix("val_"), value))
            else:
                self._train.add(step, scalar(key.removeprefix("train_"), value))

    def add_text(self, step: int, tag: str, words: str) -> None:
        """Add a text under a tag."""
        self._val.add(step, text(tag, words))

    def flush(self) -> None:
        """Write pending events. If the disk is full, raises RunFailed and keeps them."""
        self._train.flush()
        self._val.flush()


class Board:
    """One event file. Events wait in memory until a `flush` succeeds."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Start a file for a run that resumes after `step`; TensorBoard drops later points."""
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard recognises and orders event files by such names.
        stamp = f"{time.time():.6f}".replace(".", "")
        self._path = (
            folder / f"events.out.tfevents.{stamp[:10]}.{stamp[10:]}.{socket.gethostname()}"
        )
        begins = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._pending = record(Event(file_version=VERSION)) + record(begins)

    def add(self, step: int, summary: Summary) -> None:
        """Add a point of a curve, or a text."""
        self._pending += record(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Write pending events. If the disk is full, raises RunFailed and keeps them."""
        with storing(self._path):
            append(self._path, self._pending)
        self._pending = b""


def record(event: Event) -> bytes:
    """The event, stamped with the current time and framed as a TFRecord."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    head = struct.pack("<Q", len(data))
    # Length, its checksum, data, their checksum.
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
    return bytes(head + sums[0] + data + sums[1])
