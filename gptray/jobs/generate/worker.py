"""An engine's process: an actor that turns parts of the input into Parquet files."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptray.config import Config
from gptray.generation.batch import PartWriter, Progress
from gptray.generation.loading import open_engine, pack_adapter
from gptray.jobs.cluster.tasks import Failure, attempt
from gptray.jobs.generate.remote_output import publish_part
from gptray.model.adapter import Base
from gptray.model.gpu_faults import memory_told
from gptray.model.shape import model_folder
from gptray.storage.files import cache_folder, is_uri, storing
from gptray.storage.node_cache import discard, hold
from gptray.storage.remote_folder import RemoteFolder


@dataclass(frozen=True)
class GenerateTask:
    """What an engine needs to continue parts of a job's input.

    config: checked by the driver. model, output: a folder that every node sees, or a URI.
    model_name: for the files' column `model`. metadata: of the files.
    """

    config: Config
    threads: int
    model: str
    model_name: str
    output: str
    metadata: Mapping[str, str]


class EngineWorker:
    """A Ray actor with one engine. Calls come in several threads; one at a time runs the engine.

    The first part loads the model, so that its errors are returned by that call.
    """

    def __init__(self, task: GenerateTask) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._writer: PartWriter | None = None
        # Files for an object store are written to a local folder first.
        self._place = RemoteFolder(task.output) if is_uri(task.output) else None
        self._folder = _scratch() if self._place else Path(task.output)

    def feed(self, number: int, staged: str | bytes) -> list[int] | Failure:
        """Start a part; return the numbers of the parts that were written meanwhile.

        staged: its file, or the file's content.
        """
        return self._attempt(lambda: self._feed(number, staged))

    def finish(self) -> list[int] | Failure:
        """Finish all parts; return the numbers of those written meanwhile."""
        return self._attempt(lambda: self._published(self._writer.finish()) if self._writer else [])

    def _attempt(self, work: Callable[[], list[int]]) -> list[int] | Failure:
        # A cache grows with the longest sequence.
        told = memory_told("generate.max_batch_size", self._task.config.generate.max_batch_size)
        with self._lock:
            return attempt(told(work))

    def _feed(self, number: int, staged: str | bytes) -> list[int]:
        self._writer = self._writer or _writer(self._task, self._folder)
        if isinstance(staged, str):
            return self._writer.feed(number, Path(staged))
        path = self._folder / "staged"
        with storing(path):
            path.write_bytes(staged)
        return self._published(self._writer.feed(number, path))

    def _published(self, written: list[int]) -> list[int]:
        for number in written if self._place else []:
            assert self._place
            publish_part(self._folder, number, self._place)
        return written

    def progress(self) -> Progress | None:
        """The counters so far; works while the engine runs."""
        return self._writer.progress if self._writer else None

    def end(self) -> Progress | None:
        """Remove local files; return the counters."""
        if self._place:
            discard(self._folder)
        return self.progress()

    def process(self) -> int:
        return os.getpid()


def _scratch() -> Path:
    """A new folder in this node's cache, whose cleanup removes it if this process is killed."""
    folder = cache_folder() / "engines" / uuid.uuid4().hex
    hold(folder)
    folder.mkdir()
    return folder


def _writer(task: GenerateTask, folder: Path) -> PartWriter:
    torch.set_num_threads(task.threads)
    model, named = model_folder(task.model), task.config.generate.adapters or {}
    engine, tokenizer = open_engine(model, task.config, takes_adapters=bool(named))
    base = Base.of(str(model))
    return PartWriter(
        engine,
        tokenizer,
        task.config.sample,
        folder,
        num_samples=task.config.generate.num_samples,
        model=task.model_name,
        metadata=task.metadata,
        adapters={name: pack_adapter(engine, base, source) for name, source in named.items()},
    )
