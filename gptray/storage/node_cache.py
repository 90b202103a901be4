"""This node's cache: copies of folders that URIs name, and folders made here.

A copy is identified by a hash of the folder's listing, so a changed folder is fetched again. It
appears atomically, after its files were compared with the folder's manifest if it has one, and it
is verified on first use in each process. A node's processes share copies: one fetches while the
others wait. If the cache outgrows its share of the disk, the least recently used entries are
removed, but none that a process uses or that its store does not have yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gptray.config import UserError
from gptray.config.names import PREPARED
from gptray.storage.files import (
    cache_folder,
    cached_as,
    expanded,
    is_uri,
    open_lock,
    remove,
    replacing,
    storing,
)
from gptray.storage.manifest import MANIFEST, files_damage, write_manifest
from gptray.storage.remote_folder import RemoteFolder, StoredFile, no_such_folder
from gptray.wording import size_words

log = logging.getLogger("gptray")

# The largest share of the disk that the cache takes.
_MAX_DISK_SHARE = 0.25
# Entries that are removed as a whole.
_ENTRIES = (
    "fetched/*", "records/*", "copied/*", "frozen/*", "engines/*", "outputs/*", "nodes/*",
    "storage/*/*", "storage/*/data/*",
)  # fmt: skip
_DRAFT = ".draft"
_guard = threading.Lock()
# Folders that this process uses, and the descriptors of their locks, which end with it.
_used: dict[Path, int] = {}


def fetched(place: RemoteFolder, wanted: re.Pattern[str], *, most: int | None = None) -> Path:
    """A local copy of the files of `place` whose names match `wanted` entirely.

    most: bytes that the cache may take; by default a quarter of the disk.
    Raises UserError if the folder cannot be read, or its files do not match its manifest; RunFailed
    if the disk is full.
    """
    listed = place.files()
    files = [file for name, file in sorted(listed.items()) if wanted.fullmatch(name)]
    folder = cached_as("fetched", repr((place.uri, files)))

    def fetch(draft: Path) -> None:
        size = sum(file.size for file in files)
        make_room(size, most)
        log.info("fetching %s (%s)", place, size_words(size))
        _fetch(place, files, draft, has_manifest=MANIFEST in listed)

    return made_once(folder, fetch, what=str(place))


def made_once(folder: Path, make: Callable[[Path], None], *, what: str) -> Path:
    """A complete folder of the cache, protected from removal while this process lives.

    make: fills a draft of it if it does not exist or is damaged, in one process of the node while
    the others wait. what: its origin, for messages. Raises RunFailed if the disk is full, and as
    `make` does.
    """
    with _guard:
        if folder in _used:
            return folder
        with storing(folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock, used = (open_lock(_beside(folder, end)) for end in ("lock", "used"))
        with lock, used:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fcntl.flock(used, fcntl.LOCK_SH)
            problem = files_damage(folder, needed=()) if folder.is_dir() else None
            if problem:
                log.warning("the copy of %s is damaged (%s); making a new one", what, problem)
            if problem or not folder.is_dir():
                _make(folder, make)
            os.utime(folder)
            _used[folder] = os.dup(used.fileno())
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    draft = folder.with_name(folder.name + _DRAFT)
    with storing(folder):
        remove(draft)  # left by a kill
        draft.mkdir()
    try:
        make(draft)
        with storing(folder):
            write_manifest(draft)
            remove(folder)  # damaged
            os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def storage_folder(storage_path: str) -> Path:
    """The local folder of a storage_path; for a URI, the cache's folder in which runs are made.

    Raises UserError for the home of an unknown user.
    """
    if is_uri(storage_path):
        return cached_as("storage", storage_path.rstrip("/"))
    return expanded(storage_path, key="storage_path").absolute()


def copied(uri: str) -> Path:
    """A local copy of a small file that a URI names. Raises UserError, RunFailed."""
    place = RemoteFolder(uri)
    content = place.parent.read(place.name) if place.parent else None
    if content is None:
        raise UserError(f"{uri}: no such file")
    path = cache_folder() / "copied" / hashlib.sha256(content).hexdigest()[:24] / place.name
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_bytes(content)
    return path


def fetched_holder(
    uri: str, below: Sequence[str], holding: re.Pattern[str], wanted: re.Pattern[str], *, what: str
) -> Path:
    """As `fetched`, for the first folder with a file that matches `holding`: the folder that a URI
    names, or one of its folders `below`.

    what: the message if none has such a file. Raises as `fetched` does, and UserError, with the
    nearest name, if the folder does not exist.
    """
    place = RemoteFolder(uri)
    for one in (place, *(place / name for name in below)):
        if any(holding.fullmatch(name) for name in one.files()):
            return fetched(one, wanted)
    if place.files() or place.folders():
        raise UserError(f"{uri}: {what}")
    raise no_such_folder(place)


def _fetch(
    place: RemoteFolder, files: Sequence[StoredFile], draft: Path, *, has_manifest: bool
) -> None:
    """Copy files to a folder and compare them with their manifest. Raises as `fetched` does."""
    names = [file.name for file in files]
    for name in names + [MANIFEST] * has_manifest:
        try:
            place.download(name, draft / name)
        except FileNotFoundError:
            raise UserError(f"{place}: {name} disappeared while it was being read") from None
    problem = files_damage(draft, needed=names, others=False) if has_manifest else None
    for file in files:
        if (draft / file.name).stat().st_size != file.size:
            problem = f"{file.name} changed while it was being read"
    if problem:
        raise UserError(f"{place}: damaged or incomplete: {problem}")
    (draft / MANIFEST).unlink(missing_ok=True)


def make_room(size: int = 0, most: int | None = None) -> None:
    """Remove the least recently used entries until `size` more bytes fit into the cache.

    most: bytes that the cache may take; by default a quarter of the disk.
    """
    cache = cache_folder()
    if not cache.is_dir():
        return
    most = int(shutil.disk_usage(cache).total * _MAX_DISK_SHARE) if most is None else most
    folders = [one for pattern in _ENTRIES for one in cache.glob(pattern) if one.is_dir()]
    kept = {folder: _bytes_of(folder) for folder in folders if folder.name != PREPARED}
    total = sum(kept.values())
    for folder in sorted(filter(_is_replaceable, kept), key=lambda folder: folder.stat().st_mtime):
        if total + size <= most:
            return
        with open_lock(_beside(folder, "used")) as used:
            try:
                fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if _is_replaceable(folder):
                log.info("removing %s, the least recently used, to make room", folder)
                shutil.rmtree(folder, ignore_errors=True)
                total -= kept[folder]


def hold(folder: Path) -> None:
    """Protect a folder of the cache from removal while this process lives. Raises RunFailed."""
    with _guard:
        if folder in _used:
            return
        with storing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            used = open_lock(_beside(folder, "used"))
        with used:
            fcntl.flock(used, fcntl.LOCK_SH)
            _used[folder] = os.dup(used.fileno())


def discard(folder: Path) -> None:
    """Remove a folder of the cache that only this process uses, and its lock."""
    with _guard:
        shutil.rmtree(folder, ignore_errors=True)
        _beside(folder, "used").unlink(missing_ok=True)
        os.close(_used.pop(folder))


def set_published(folder: Path, is_published: bool) -> None:
    """Record whether the store has all of a folder that was made here. Raises RunFailed."""
    mark = _beside(folder, "published")
    with storing(mark):
        if is_published:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name.removesuffix(_DRAFT)}.{what}")


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder can be fetched or made again."""
    kind = folder.relative_to(cache_folder()).parts[0]
    if kind == "outputs":
        return not any(folder.rglob("part-*.parquet"))
    return kind != "storage" or _beside(folder, "published").exists()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
