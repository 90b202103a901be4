"""Where to read the records of a storage path's runs: in their folders, or in local copies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptray.commands import typed
from gptray.config import Config, UserError, load_saved
from gptray.config.names import PREPARED
from gptray.jobs.folders.fetching import fetch_records
from gptray.jobs.folders.resuming import command
from gptray.jobs.models import CONFIG, storage_of
from gptray.storage.driver_lock import is_held
from gptray.storage.files import is_uri
from gptray.storage.lease import is_leased
from gptray.storage.remote_folder import RemoteFolder, StoredFile


@dataclass(frozen=True)
class RecordPlace:
    """A folder of a storage path, or a local copy of the records in the one at the URI `path`.

    is_held: whether a job is at work in it. bytes: its files' size. changed: when one of its own
    files last changed. problem: why these are not known.
    """

    folder: Path
    path: str
    is_held: bool = False
    bytes: int = 0
    changed: float = 0.0
    problem: str = ""

    def config(self) -> Config:
        """The run's own config."""
        return load_saved(self.folder / CONFIG)

    def command(self, job: str, config: Config, *words: str) -> str:
        """The command that resumes the run, with extra arguments."""
        if not is_uri(self.path):
            return command(job, config, self.folder, *words)
        storage, _, name = self.path.rpartition("/")
        if (config.storage_path, config.name) != (storage, name):  # the run has been copied
            words = (f"name={name}", f"storage_path={storage}", *words)
        return typed(job, "--config", f"{self.path}/{CONFIG}", *words)


@contextmanager
def record_places(config: Config) -> Iterator[list[RecordPlace]]:
    """Everything in `storage_path` except prepared text and hidden folders.

    Raises UserError for a storage path that cannot be listed.
    """
    if is_uri(config.storage_path):
        with tempfile.TemporaryDirectory() as folder:
            yield _in_store(RemoteFolder(config.storage_path.rstrip("/")), Path(folder))
        return
    storage = storage_of(config)
    try:
        folders = [one for one in storage.iterdir() if one.is_dir()] if storage.exists() else []
    except OSError as error:
        raise UserError(f"storage_path={config.storage_path}: {error.strerror}") from None
    yield [_here(one) for one in folders if one.name[0] != "." and one.name != PREPARED]


def _here(folder: Path) -> RecordPlace:
    try:
        size, changed = _size(folder)
        return RecordPlace(folder, str(folder), is_held(folder), size, changed)
    except OSError as error:
        return RecordPlace(folder, str(folder), problem=f"cannot be read: {error.strerror}")


def _in_store(storage: RemoteFolder, folder: Path) -> list[RecordPlace]:
    """The runs in an object store, with their records fetched to a local folder."""
    files: dict[str, dict[str, StoredFile]] = {}
    for path, file in storage.files(deep=True).items():
        top, _, name = path.partition("/")
        if name and top[0] != "." and top != PREPARED:
            files.setdefault(top, {})[name] = file
    found = []
    for top, names in files.items():
        fetch_records(storage / top, names, folder / top)
        own = [file.modified / 1e9 for name, file in names.items() if "/" not in name]
        size = sum(file.size for file in names.values())
        place = str(storage / top)
        changed = max(own, default=0.0)
        found.append(RecordPlace(folder / top, place, is_leased(names), size, changed))
    return found


def _size(folder: Path) -> tuple[int, float]:
    """Bytes of a folder's files, not following links, and when one directly in it last changed."""
    size, changed = 0, folder.stat().st_mtime
    for place, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(place, name))
            size += status.st_size
            if place == str(folder):
                changed = max(changed, status.st_mtime)
    return size, changed
