"""What the first worker writes beside the checkpoints: metrics.jsonl and TensorBoard files.

`metrics.jsonl` has no step twice and none missing: a resumed run first drops the rows after its
checkpoint, then writes them again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from gptray.files import replacing
from gptray.record import METRICS, read_rows


class Journal:
    """The writer of one run's metrics, held by the rank-0 worker alone."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open the journal of a run that goes on after `step`; later rows are dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS
        _keep_until(self._path, step)
        self._file: TextIO = self._path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of one logged step; readers see it at once."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs in TensorBoard."""
        text = "\n\n".join(f"**{prompt}**{output}" for prompt, output in samples)
        self._board.add_text("samples", text, step)

    def sync(self) -> None:
        """Have every row on disk, as a checkpoint promises that the rows before it are there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

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


def _keep_until(path: Path, step: int) -> None:
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    with replacing(path) as draft, draft.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
