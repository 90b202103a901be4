"""What the first worker writes beside the checkpoints: metrics.jsonl and TensorBoard files.

`metrics.jsonl` has no step twice and none missing: a resumed run first drops the rows after its
checkpoint, then writes them again. A score that comes late is added to its step's row. Rows for
which there is no room wait in memory until the next one, or until `sync`, which must have them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gptray.config import RunFailed
from gptray.files import append, replacing, storing
from gptray.record import METRICS, read_rows
from gptray.training.board import Boards


class Journal:
    """The writer of one run's metrics, held by the rank-0 worker alone."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open the journal of a run that goes on after `step`; later rows are dropped.

        Raises:
            RunFailed: here and in all that writes: the disk is full or cannot be written.
        """
        self._path = run_dir / METRICS
        with storing(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, [row for row in read_rows(self._path) if row["step"] <= step])
        self._pending = b""
        self._boards = Boards(run_dir / "tensorboard", run_dir.resolve().name, step=step)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of one logged step; readers see it at once, or as soon as there is room."""
        self._pending += _line(row)
        self._show(row)
        with suppress(OSError, RunFailed):
            self._drain()
            self._boards.flush()

    def row(self, step: int) -> dict[str, Any]:
        """The row of a step that was written before.

        Raises:
            RunFailed: there is none, which only a change from outside explains.
        """
        for row in read_rows(self._path):
            if row["step"] == step:
                return row
        raise RunFailed(f"{self._path} has lost the row of step {step}; restore it from a copy")

    def amend(self, row: dict[str, Any]) -> None:
        """Put a row in the place of its step's, on disk at once; readers see one or the other."""
        with storing(self._path):
            self._drain()
            before = self.row(row["step"])
            _rewrite(self._path, [row if one == before else one for one in read_rows(self._path)])
        self._show({key: row[key] for key in row if key == "step" or key not in before})

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs in TensorBoard."""
        words = "\n\n".join(f"**{prompt}**{output}" for prompt, output in samples)
        self._boards.show_text(step, "samples", words)

    def sync(self) -> None:
        """Have every row on disk, as a checkpoint promises that the rows before it are there."""
        with storing(self._path):
            self._drain(sync=True)
        self._boards.flush()

    def _drain(self, *, sync: bool = False) -> None:
        append(self._path, self._pending, sync=sync)
        self._pending = b""

    def _show(self, row: dict[str, Any]) -> None:
        self._boards.show(row["step"], {key: row[key] for key in row if key != "step"})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what waits. What no checkpoint has promised yet is made again by a later start."""
        with suppress(OSError, RunFailed):
            self._drain()
            self._boards.flush()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as draft, draft.open("wb") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
