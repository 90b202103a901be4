"""Trains a run on a node that does not see the driver's folder, in a local folder.

What the run needs is fetched from the driver before it starts, and its tokens from the store. What
it writes is sent to the driver, which publishes it. Training waits until the driver has a
checkpoint, so that a lost node costs only the steps since the last one.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from gptray.config import RunFailed
from gptray.jobs.folders.driver_folder import BLOCK_BYTES
from gptray.jobs.folders.fetching import checkpoint_of, fetch_checkpoint, fetch_run
from gptray.jobs.folders.origin import FolderAtDriver, Origin
from gptray.jobs.folders.publisher import RunPublisher, Sent, version_of
from gptray.jobs.folders.remote_data import tokens_here
from gptray.jobs.progress.doing import following
from gptray.jobs.train.task import TrainTask
from gptray.storage.files import remove
from gptray.storage.node_cache import make_room
from gptray.storage.record import EVENTS, METRICS
from gptray.training.run import writing
from gptray.training.workers import Workers

log = logging.getLogger("gptray")

# How often to send new rows and notices between reports.
SEND_S = 1.0


class RunOnNode:
    """A run that this worker trains. task: with this node's folders.

    fetches_from: where to fetch checkpoints from, on the worker that does so for a node other than
    the writer's.
    """

    def __init__(
        self,
        task: TrainTask,
        publisher: NodePublisher | None = None,
        fetches_from: FolderAtDriver | None = None,
    ) -> None:
        self.task, self._fetches_from = task, fetches_from
        self._publisher, self._guard = publisher, threading.Lock()

    def send(self) -> None:
        """Send all that is new to the driver; every worker calls this at the same point.

        Raises RunFailed on every worker.
        """
        if self.task.origin:
            Workers.current().from_first(self.publish)

    def fetch(self, checkpoint: Path) -> None:
        """Fetch a checkpoint that was sent to the driver. Raises UserError, RunFailed."""
        if self._fetches_from:
            place = self._fetches_from / checkpoint.name
            fetch_checkpoint(place, checkpoint, place.files(deep=True))

    def publish(self) -> None:
        """Send what is new, if this worker is the writer. Raises RunFailed."""
        if self._publisher:
            with self._guard:
                self._publisher.publish()

    @contextmanager
    def following(self) -> Iterator[None]:
        """In the block, send what is new every second, and at its end. Raises RunFailed."""
        try:
            with following(self._look, every_s=SEND_S) if self._publisher else nullcontext():
                yield
        except BaseException:
            with suppress(RunFailed):
                self.publish()
            raise
        self.publish()

    def _look(self) -> None:
        try:
            self.publish()
        except RunFailed as error:
            log.warning("not sent to the driver yet: %s", error)


@contextmanager
def run_on_node(
    task: TrainTask, *, fetches: bool = True, is_on_first_node: bool = True
) -> Iterator[RunOnNode]:
    """Prepare a run on this node for the worker that trains it; every worker enters this together.

    fetches: whether this worker fetches files for its node. is_on_first_node: whether it is on the
    node of the worker that writes the run.
    Raises UserError or RunFailed on every worker; at the end, RunFailed on the first.
    """
    if task.origin is None:
        yield RunOnNode(task)
        return
    origin = task.origin
    run = Workers.current().all_or_none(
        lambda: _prepared(task, origin, fetches=fetches, is_on_first_node=is_on_first_node)
    )
    with run.following():
        yield run


def _prepared(
    task: TrainTask, origin: Origin, *, fetches: bool, is_on_first_node: bool
) -> RunOnNode:
    """Fetch what this worker's node needs. Raises UserError, RunFailed."""
    name, is_writer = origin.name_of(task.run_dir), Workers.current().is_first
    number = origin.call("begin", name) if is_writer else 0
    assert isinstance(number, int)
    if origin.is_here:
        return RunOnNode(task)
    folder = origin.folder_here(task.run_dir)
    place = FolderAtDriver(origin.call, (name, number), name)
    sent = Sent()
    make_room()
    if fetches and is_on_first_node:
        with writing(folder):  # a worker of a killed job may run for some more seconds
            sent = fetch_run(place, folder, needed_by_writer(place))
    elif fetches and isinstance(newest := origin.call("newest", name), str):
        names = place.files(deep=True)
        fetch_run(place, folder, [one for one in names if checkpoint_of(one) == newest])
    here = replace(_with_tokens(task, origin, fetches=fetches), run_dir=folder)
    publisher = NodePublisher(place, folder, sent) if is_writer else None
    return RunOnNode(here, publisher, place if fetches and not is_on_first_node else None)


def needed_by_writer(place: FolderAtDriver) -> list[str]:
    """The files of a run that its writer needs.

    All checkpoints, since it removes old ones; the rows, which it continues; the events, which
    record the run's backend.
    """
    files = place.files(deep=True)
    return [name for name in files if name in (METRICS, EVENTS) or checkpoint_of(name)]


def _with_tokens(task: TrainTask, origin: Origin, *, fetches: bool = True) -> TrainTask:
    """The task with the run's tokens on this node. Raises UserError, RunFailed."""

    def here(data_dir: Path) -> Path:
        return tokens_here(origin.storage_path, data_dir.name, fetches=fetches)

    also = {name: here(folder) for name, folder in task.also.items()}
    return replace(task, data_dir=here(task.data_dir), also=also)


@contextmanager
def checkpoint_on_node(task: TrainTask, name: str) -> Iterator[tuple[Path, TrainTask]]:
    """Fetch what is needed to score a run's checkpoint on this node.

    Yields the checkpoint, and the task with local tokens and a folder that has the run's events.
    Raises UserError, RunFailed.
    """
    origin = task.origin
    if origin is None or origin.is_here:
        yield task.run_dir / name, task
        return
    run, folder = origin.name_of(task.run_dir), origin.folder_here(task.run_dir) / name
    is_here = folder.exists()  # if a worker of the run is on this node
    whole = FolderAtDriver(origin.call, (run, 0), run)
    fetch_checkpoint(whole / name, folder, (whole / name).files(deep=True))
    # They record the run's backend. A local worker's events may be old, or are its own to write.
    events = folder.parent / ".scored"
    whole.download(EVENTS, events / EVENTS)
    try:
        yield folder, replace(_with_tokens(task, origin), run_dir=events)
    finally:
        if not is_here:
            remove(folder)


class NodePublisher(RunPublisher):
    """Sends changes in a run's folder on this node to the driver's folder."""

    def __init__(self, driver: FolderAtDriver, folder: Path, sent: Sent) -> None:
        super().__init__(driver, folder, sent)
        self._driver = driver
        # How many bytes of the local events the driver has; at first, those fetched from it.
        self._told = (folder / EVENTS).stat().st_size if (folder / EVENTS).exists() else 0
        # By file that grows: how many bytes were sent, and their digest.
        self._grown: dict[Path, tuple[int, bytes]] = {}

    def publish(self) -> None:
        """Send all that has changed. Raises RunFailed."""
        events = self._new_events()  # sent last, after the files that they are about
        super().publish()
        if events:
            self._driver.append_events(events)
            self._told += len(events)

    def _new_events(self) -> bytes:
        try:
            events = (self._folder / EVENTS).read_bytes()[self._told :]
        except FileNotFoundError:
            return b""
        return events[: events.rfind(b"\n") + 1]

    def _send(self, *paths: Path) -> None:
        # Not the events file, since the driver's has other events too.
        super()._send(*(path for path in paths if path.name != EVENTS))

    def _write(self, path: Path) -> None:
        """Send what was appended to a file, or the whole file if it changed otherwise."""
        content, name = path.read_bytes(), self._name(path)
        size, digest = self._grown.get(path, (0, b""))
        if size and hashlib.sha256(content[:size]).digest() == digest:
            for offset in range(size, len(content), BLOCK_BYTES):
                self._driver.append(name, offset, content[offset : offset + BLOCK_BYTES])
        else:
            self._driver.write(name, content)
        self._grown[path] = len(content), hashlib.sha256(content).digest()

    def _send_model(self) -> None:
        """Send the best model, its weights last."""
        files = [path for path in self._folder.glob("model/*") if path.name[0] != "."]
        for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):
            version = version_of(path)
            if self._sent.files.get(path) != version:
                self._driver.upload(path, self._name(path))
                self._sent.files[path] = version
