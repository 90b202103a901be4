"""A run's TensorBoard file, written in the training thread.

tensorboardX's own writer has a thread and a queue: on a full disk the thread dies, and
adding to the queue then blocks forever. Its messages are used here, and written when they are due.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar, text

from gptray.files import append, storing

# What an events file begins with.
VERSION = "brain.Event:2"
# How the values of an evaluation begin.
_OF_VAL = ("val_", "gap", "also/")


class Boards:
    """A run's curves: training and validation losses in one chart.

    TensorBoard draws what has one tag in one chart, with a colour for each folder: the folders are
    `<name>/train` and `<name>/val`, and both losses have the tag `loss`.
    """

    def __init__(self, folder: Path, name: str, *, step: int) -> None:
        self._train = Board(folder / name / "train", step=step)
        self._val = Board(folder / name / "val", step=step)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the curve of each value of a row of metrics."""
        of_val = {key: value for key, value in values.items() if key.startswith(_OF_VAL)}
        self._val.show(step, {key.removeprefix("val_"): value for key, value in of_val.items()})
        rest = {key: value for key, value in values.items() if key not in of_val}
        self._train.show(step, {key.removeprefix("train_"): rest[key] for key in rest})

    def show_text(self, step: int, tag: str, words: str) -> None:
        """Add a text under a tag."""
        self._val.show_text(step, tag, words)

    def flush(self) -> None:
        """Write what waits. Raises RunFailed, and keeps it, where there is no room."""
        self._train.flush()
        self._val.flush()


class Board:
    """One events file. What cannot be written yet waits in memory for the next `flush`."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Begin a file of a run that resumes after `step`: TensorBoard drops later points."""
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # The name by which TensorBoard knows such files and their order.
        stamp = f"{time.time():.6f}".replace(".", "")
        self._path = (
            folder / f"events.out.tfevents.{stamp[:10]}.{stamp[10:]}.{socket.gethostname()}"
        )
        self._pending = b""
        self._add(Event(file_version=VERSION))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def show(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the curve of each value."""
        for key, value in values.items():
            self._add(Event(step=step, summary=scalar(key, value)))

    def show_text(self, step: int, tag: str, words: str) -> None:
        """Add a text under a tag."""
        self._add(Event(step=step, summary=text(tag, words)))

    def flush(self) -> None:
        """Write what waits. Raises RunFailed, and keeps it, where there is no room."""
        with storing(self._path):
            append(self._path, self._pending)
        self._pending = b""

    def _add(self, event: Event) -> None:
        self._pending += record(event)


def record(event: Event) -> bytes:
    """An event of now as the files have it."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    head = struct.pack("<Q", len(data))
    # TFRecord: length, its checksum, data, their checksum.
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
    return bytes(head + sums[0] + data + sums[1])
