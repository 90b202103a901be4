"""Gives workers on other nodes access, through Ray, to a run's folder on the driver's node.

A run whose storage is an object store is made in a folder on the driver's node and published from
there (`gptray.jobs.folders.remote_run`). Other nodes do not see that folder: an actor on the
driver's node reads and writes it for them. Files that a worker sends appear atomically, as if
written locally.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gptray.config import RunFailed
from gptray.jobs.cluster.tasks import Failure, attempt
from gptray.jobs.folders.fetching import checkpoint_of
from gptray.jobs.folders.publisher import Version, is_hidden, version_of
from gptray.storage.files import append, remove, storing
from gptray.storage.manifest import MANIFEST
from gptray.storage.record import EVENTS, write_event
from gptray.training.checkpoint import find_checkpoints, newest_intact

# How much of a file is read or sent in one call.
BLOCK_BYTES = 32 << 20

# A run below the folder, and its writer's number; only the newest writer may write.
Writer = tuple[str, int]


class DriverFolder:
    """A Ray actor on the driver's node.

    File names are relative to the folder. A checkpoint is a draft until its manifest arrives. If
    Ray repeats a call, files stay the same, except that an event may be written twice.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writers: dict[str, int] = {}
        # By run: its checkpoints when last checked, and the newest intact one.
        self._newest: dict[str, tuple[dict[str, Version], str | None]] = {}

    def call(self, method: str, *arguments: object) -> object | Failure:
        """Call one of the methods below."""
        return attempt(lambda: getattr(self, method)(*arguments))

    def begin(self, run: str) -> int:
        """Give a run a new writer; earlier ones, on lost nodes, are refused from now on."""
        for draft in (self._root / run).glob(".checkpoint_*.tmp"):
            remove(draft)
        self._writers[run] = time.time_ns()
        return self._writers[run]

    def files(self, name: str) -> dict[str, int]:
        """The size of each file in a folder, by relative name."""
        folder = self._root / name
        sizes = {}
        for path in folder.rglob("*"):
            one = path.relative_to(folder).as_posix()
            with suppress(FileNotFoundError):  # the driver writes and removes files there too
                if not is_hidden(one) and path.is_file():
                    sizes[one] = path.stat().st_size
        return sizes

    def newest(self, run: str) -> str | None:
        """The newest intact checkpoint of a run. Raises RunFailed if all are damaged.

        Files are verified again only if checkpoints were added or removed, maybe by a local worker.
        """
        folders = find_checkpoints(self._root / run)
        there = {one.name: version_of(one) for one in folders}
        if run not in self._newest or self._newest[run][0] != there:
            folder, _ = newest_intact(self._root / run)
            self._newest[run] = there, folder.name if folder else None
        return self._newest[run][1]

    def read(self, name: str, offset: int) -> bytes | None:
        """A block of a file; empty at its end, None if there is no file."""
        try:
            with (self._root / name).open("rb") as file:
                file.seek(offset)
                return file.read(BLOCK_BYTES)
        except FileNotFoundError:
            return None

    def put(self, writer: Writer, name: str, offset: int, block: bytes, is_last: bool) -> None:
        """Receive a block of a new version of a file, which appears with the last block."""
        self._check(writer)
        path = self._place(name)
        draft = path.with_name(f".{path.name}.sent")
        checkpoint = checkpoint_of(name)
        is_whole = bool(checkpoint) and name == f"{checkpoint}/{MANIFEST}"
        if not (draft.exists() if offset else path.parent.exists() or not is_whole):
            return  # a repeated call
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(block)
            if not is_last:
                return
            os.replace(draft, path)
            if checkpoint and is_whole:
                remove(self._root / checkpoint)
                os.rename(path.parent, self._root / checkpoint)

    def append(self, writer: Writer, name: str, offset: int, block: bytes) -> None:
        """Receive what was appended to a file."""
        self._check(writer)
        path = self._root / name
        with storing(path), path.open("r+b") as file:
            file.seek(offset)
            file.write(block)

    def append_events(self, writer: Writer, lines: bytes) -> None:
        """Append events from a run's writer; the driver writes others."""
        self._check(writer)
        path = self._root / writer[0] / EVENTS
        with storing(path):
            append(path, lines, cut_torn=True)

    def note(self, run: str, event: str, fields: dict[str, object]) -> None:
        """Write an event of a run."""
        write_event(self._root / run, event, **fields)

    def remove_all(self, writer: Writer, name: str) -> None:
        """Remove a folder, which disappears atomically."""
        self._check(writer)
        path = self._root / name
        with storing(path):
            hidden = path.with_name(f".{path.name}.old")
            remove(hidden)
            if path.exists():
                os.rename(path, hidden)
            remove(hidden)

    def _check(self, writer: Writer) -> None:
        run, number = writer
        if self._writers.setdefault(run, number) != number:
            raise RunFailed(f"another worker has taken over the run {self._root / run}")

    def _place(self, name: str) -> Path:
        """Where to write a file: one of a checkpoint in the checkpoint's draft."""
        checkpoint = checkpoint_of(name)
        if checkpoint is None:
            return self._root / name
        folder = self._root / checkpoint
        draft = folder.with_name(f".{folder.name}.tmp")
        return draft / PurePosixPath(name).relative_to(checkpoint)
