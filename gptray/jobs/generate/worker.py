"""What runs in an engine's process: an actor that turns parts of the input into Parquet files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from gptray.generation.batch import PartWriter, Progress
from gptray.generation.loading import open_engine
from gptray.jobs.generate.task import GenerateTask
from gptray.jobs.tasks import Failure, attempt
from gptray.model.shape import model_folder


class EngineWorker:
    """A Ray actor: one engine. Calls come in several threads; one at a time runs the engine.

    The model is loaded by the first part, so that what is wrong with it is a call's error.
    """

    def __init__(self, task: GenerateTask) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._writer: PartWriter | None = None

    def feed(self, number: int, staged: str) -> list[int] | Failure:
        """Take on a part; return the numbers of the parts that were written meanwhile."""
        with self._lock:
            return attempt(lambda: self._feed(number, Path(staged)))

    def finish(self) -> list[int] | Failure:
        """Run all parts to their end; return the numbers of those written meanwhile."""
        with self._lock:
            return attempt(self._writer.finish) if self._writer else []

    def _feed(self, number: int, staged: Path) -> list[int]:
        self._writer = self._writer or _writer(self._task)
        return self._writer.feed(number, staged)

    def progress(self) -> Progress | None:
        """Counters so far; answers while the engine runs."""
        return self._writer.progress if self._writer else None

    def process(self) -> int:
        """Its process id."""
        return os.getpid()


def _writer(task: GenerateTask) -> PartWriter:
    torch.set_num_threads(task.threads)
    engine, tokenizer = open_engine(model_folder(task.model), task.config)
    return PartWriter(
        engine,
        tokenizer,
        task.config.sample,
        task.output_dir,
        num_samples=task.config.generate.num_samples,
        model=task.model_name,
        metadata=task.metadata,
    )
