"""This node's copies of folders that URIs name: whole, verified, and no more than fit.

A copy is kept under a hash of what the folder held, so that a changed one is fetched anew. It
appears by rename, after its files were compared with the folder's own manifest where it has one,
and it is verified at its first use in each process. Processes of a node share the copies: one
fetches while the others wait, and none is removed that a process uses.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from gptray.config import UserError
from gptray.files import cache_folder, expanded, is_uri, open_lock, remove, storing
from gptray.manifest import MANIFEST, files_damage, write_manifest
from gptray.remote_folder import RemoteFolder, StoredFile, no_such_folder

log = logging.getLogger("gptray")

# The share of a disk that copies take at most.
_MOST_OF_DISK = 0.25
_guard = threading.Lock()
# The copies that this process uses, with descriptors of their locks: they end with the process.
_used: dict[Path, int] = {}


def fetched(place: RemoteFolder, wanted: re.Pattern[str], *, most: int | None = None) -> Path:
    """A folder on this node with the files of `place` whose whole names match `wanted`.

    most: bytes that all copies may take; by default a quarter of the disk.

    Raises:
        UserError: the folder cannot be read, or its files are not those of its manifest.
        RunFailed: there is no room.
    """
    listed = place.files()
    files = [file for name, file in sorted(listed.items()) if wanted.fullmatch(name)]
    cache = cache_folder() / "fetched"
    folder = cache / hashlib.sha256(repr((place.uri, files)).encode()).hexdigest()[:24]
    with _guard:
        if folder in _used:
            return folder
        with storing(cache):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock, used = (open_lock(folder.with_suffix(end)) for end in (".lock", ".used"))
        with lock, used:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fcntl.flock(used, fcntl.LOCK_SH)
            problem = files_damage(folder, needed=()) if folder.is_dir() else None
            if problem:
                log.warning("the copy of %s is damaged (%s): fetching it again", place, problem)
            if problem or not folder.is_dir():
                _make_room(cache, sum(file.size for file in files), most)
                _fetch(place, files, folder, has_manifest=MANIFEST in listed)
            os.utime(folder)
            _used[folder] = os.dup(used.fileno())
    return folder


def storage_folder(storage_path: str) -> Path:
    """The folder on this node of a storage_path: of a URI, the one in which its runs are made.

    Raises UserError for the home of an unknown user.
    """
    if is_uri(storage_path):
        name = hashlib.sha256(storage_path.rstrip("/").encode()).hexdigest()[:24]
        return cache_folder() / "storage" / name
    return expanded(storage_path, key="storage_path").absolute()


def fetched_holder(
    uri: str, below: Sequence[str], holding: re.Pattern[str], wanted: re.Pattern[str], *, what: str
) -> Path:
    """As `fetched`, of the folder that a URI names, or of the first of its folders `below`.

    It is the one with a file that matches `holding`; what: what is said where none has one.
    Raises as `fetched`, and UserError for a folder that is not there, with the nearest name.
    """
    place = RemoteFolder(uri)
    for one in (place, *(place / name for name in below)):
        if any(holding.fullmatch(name) for name in one.files()):
            return fetched(one, wanted)
    if place.files() or place.folders():
        raise UserError(f"{uri}: {what}")
    raise no_such_folder(place)


def _fetch(
    place: RemoteFolder, files: Sequence[StoredFile], folder: Path, *, has_manifest: bool
) -> None:
    """Copy files to a folder, which appears whole. Raises as `fetched`."""
    size = sum(file.size for file in files)
    log.info("fetching %s (%.1f MB)", place, size / 1e6)
    draft = folder.with_suffix(".draft")
    with storing(folder):
        remove(draft)  # left by a kill
        draft.mkdir()
    try:
        names = [file.name for file in files]
        for name in names + [MANIFEST] * has_manifest:
            _download(place, name, draft)
        problem = files_damage(draft, needed=names, others=False) if has_manifest else None
        for file in files:
            if (draft / file.name).stat().st_size != file.size:
                problem = f"{file.name} changed while it was read"
        if problem:
            raise UserError(f"{place}: damaged or incomplete: {problem}")
        with storing(folder):
            (draft / MANIFEST).unlink(missing_ok=True)
            write_manifest(draft)
            remove(folder)
            os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _download(place: RemoteFolder, name: str, draft: Path) -> None:
    try:
        place.download(name, draft / name)
    except FileNotFoundError:
        raise UserError(f"{place}: {name} went away while it was read") from None


def _make_room(cache: Path, size: int, most: int | None) -> None:
    """Remove the copies used least recently that no process uses, until `size` bytes fit."""
    most = int(shutil.disk_usage(cache).total * _MOST_OF_DISK) if most is None else most
    kept = {folder: _bytes_of(folder) for folder in cache.iterdir() if folder.is_dir()}
    total = sum(kept.values())
    for folder in sorted(kept, key=lambda folder: folder.stat().st_mtime):
        if total + size <= most:
            return
        with open_lock(folder.with_suffix(".used")) as used:
            try:
                fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            log.info("removing %s, unused for longest, to make room", folder)
            shutil.rmtree(folder, ignore_errors=True)
            total -= kept[folder]


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
