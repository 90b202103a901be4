"""What the first worker writes beside the checkpoints: metrics.jsonl and TensorBoard files.

`metrics.jsonl` has no step twice and none missing: a resumed run first drops the rows after its
checkpoint, then writes them again. A score that comes late is added to its step's row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from gptray.config import RunFailed
from gptray.files import replacing
from gptray.record import METRICS, read_rows


class Journal:
    """The writer of one run's metrics, held by the rank-0 worker alone."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open the journal of a run that goes on after `step`; later rows are dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS
        _rewrite(self._path, [row for row in read_rows(self._path) if row["step"] <= step])
        self._file: TextIO = self._path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of one logged step; readers see it at once."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._show(row)

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
        before = self.row(row["step"])
        rows = [row if one == before else one for one in read_rows(self._path)]
        self._file.close()
        _rewrite(self._path, rows)
        self._file = self._path.open("a")
        self._show({key: row[key] for key in row if key == "step" or key not in before})

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs in TensorBoard."""
        text = "\n\n".join(f"**{prompt}**{output}" for prompt, output in samples)
        self._board.add_text("samples", text, step)

    def sync(self) -> None:
        """Have every row on disk, as a checkpoint promises that the rows before it are there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def _show(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()


def _rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as draft, draft.open("w") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
