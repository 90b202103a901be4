"""A run's metrics.jsonl and TensorBoard files, which the first worker writes.

`metrics.jsonl` has every logged step exactly once: a resumed run drops the rows after its
checkpoint and writes them again. A late score is added to its step's row. On a full disk, rows
wait in memory until the next row, or until `sync`, which fails if there is still no space.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from gptray.config import RunFailed
from gptray.storage.files import append, replacing, storing
from gptray.storage.record import METRICS, MetricsRow, curves, read_rows
from gptray.training.board import Boards


class Journal:
    """The writer of a run's metrics; only the rank-0 worker has one."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open the journal of a run that resumes after `step`; later rows are dropped.

        Raises RunFailed if the disk is full or not writable, as `amend` and `sync` do.
        """
        self._path = run_dir / METRICS
        with storing(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            _rewrite(self._path, [row for row in read_rows(self._path) if row["step"] <= step])
        self._pending = b""
        self._boards = Boards(run_dir / "tensorboard", run_dir.resolve().name, step=step)

    def write(self, row: Mapping[str, float]) -> None:
        """Add a logged step's row; readers see it at once, or as soon as the disk has space."""
        self._pending += _line(row)
        self._show(row)
        self._write_if_possible()

    def row(self, step: int) -> dict[str, float]:
        """The row of a step that has been written.

        Raises RunFailed if it is missing because something else has changed the file.
        """
        for row in read_rows(self._path):
            if row["step"] == step:
                return row
        raise RunFailed(f"{self._path} has lost the row of step {step}; restore it from a copy")

    def amend(self, row: Mapping[str, float]) -> None:
        """Replace the row of the same step on disk; readers see either the old or the new one."""
        with storing(self._path):
            self._drain()
            before = self.row(int(row["step"]))
            _rewrite(self._path, [row if one == before else one for one in read_rows(self._path)])
        self._show({key: row[key] for key in row if key == "step" or key not in before})

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs in TensorBoard."""
        words = "\n\n".join(f"**{prompt}**{output}" for prompt, output in samples)
        self._boards.add_text(step, "samples", words)

    def sync(self) -> None:
        """Sync every row to disk, before the checkpoint that relies on it."""
        with storing(self._path):
            self._drain(sync=True)
        self._boards.flush()

    def _drain(self, *, sync: bool = False) -> None:
        append(self._path, self._pending, sync=sync)
        self._pending = b""

    def _show(self, row: Mapping[str, float]) -> None:
        self._boards.add_scalars(int(row["step"]), curves(cast(MetricsRow, row)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        """Write pending rows if possible; if not, the run writes them again when it resumes."""
        self._write_if_possible()

    def _write_if_possible(self) -> None:
        with suppress(OSError, RunFailed):
            self._drain()
            self._boards.flush()


def _line(row: Mapping[str, float]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _rewrite(path: Path, rows: Iterable[Mapping[str, float]]) -> None:
    with replacing(path) as draft, draft.open("wb") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
