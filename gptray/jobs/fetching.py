"""A run's folder here, made equal to one elsewhere: in an object store, or on the driver's node.

What is here already is kept; of a checkpoint that is decided by its manifest. Of a run in a store
that is only looked at, the records are fetched alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gptray.files import cached_as, remove, storing
from gptray.jobs.publisher import Home, Sent, Version, is_hidden, version_of
from gptray.manifest import MANIFEST, files_damage
from gptray.remote_folder import RemoteFolder
from gptray.training.checkpoint import checkpoint_step

log = logging.getLogger("gptray")

# Files that are fetched at a time.
_AT_ONCE = 8
# The records of a run, an evaluation, a sweep or its trials.
_RECORD = re.compile(
    r"(trials/[^/]+/)?"
    r"(config\.yaml|(metrics|events|trials)\.jsonl|evaluation\.json|model/(config|gptray)\.json)"
)


def fetch_run(
    home: Home,
    folder: Path,
    names: Collection[str],
    *,
    ended: Callable[[], Collection[Path]] = tuple,
) -> Sent:
    """Make a folder equal to what `home` has by these names, and nothing else; what is there of it.

    A checkpoint without a manifest is not fetched. ended: once all other files are here, the runs
    below the folder whose checkpoints are not needed.

    Raises:
        UserError: the home cannot be read.
        RunFailed: there is no room.
    """
    checkpoints = {one for name in names if (one := checkpoint_of(name))}
    wholes = {one for one in checkpoints if f"{one}/{MANIFEST}" in names}
    others = [name for name in names if not checkpoint_of(name)]
    _remove_all_but({*others, *wholes}, folder)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: home.download(name, folder / name), others))
    without = ended()
    sent = Sent(_versions([folder / name for name in others], without))
    for name in sorted(checkpoints):
        path = folder / name
        if path.parent not in without:
            files = [one[len(name) + 1 :] for one in names if one.startswith(f"{name}/")]
            is_whole = name in wholes
            sent.checkpoints[path] = (
                fetch_checkpoint(home / name, path, files) if is_whole else None
            )
    return sent


def checkpoint_of(name: str) -> str | None:
    """The checkpoint, of a run or of a sweep's trial, that a file or folder is or belongs to."""
    path = PurePosixPath(name)
    found = [one for one in (path, *path.parents) if checkpoint_step(Path(one)) is not None]
    return found[-1].as_posix() if found else None


def fetch_checkpoint(place: Home, folder: Path, files: Iterable[str]) -> bytes | None:
    """Fetch a checkpoint unless it is here; return its manifest. files: their names in it."""
    manifest = place.read(MANIFEST)
    with suppress(OSError):
        if (folder / MANIFEST).read_bytes() == manifest and not files_damage(folder, needed=()):
            return manifest
    log.info("fetching %s", place)
    draft = folder.with_name(f".{folder.name}.tmp")
    with storing(folder):
        remove(draft)
        for name in files:
            place.download(name, draft / name)
        remove(folder)
        os.rename(draft, folder)
    return manifest


def _remove_all_but(kept: set[str], folder: Path) -> None:
    """Remove all files but these and whole checkpoints, by name."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in kept or checkpoint_of(name) in kept or is_hidden(name):
            continue
        if path.is_file() or checkpoint_step(path) is not None:
            remove(path)


def _versions(paths: Iterable[Path], ended: Collection[Path]) -> dict[Path, Version]:
    """Those of files that were fetched; of models only where they are known to be whole there."""
    return {
        path: version_of(path)
        for path in paths
        if path.parent.name != "model" or path.parents[1] in ended
    }


def fetch_records(home: RemoteFolder, names: Iterable[str], folder: Path) -> None:
    """Have a folder here with the records among a run's files, for whoever only reads them.

    Raises UserError for a store that cannot be read; RunFailed without room.
    """
    with storing(folder):
        remove(folder)

    def fetch(name: str) -> None:
        with suppress(FileNotFoundError):  # it went away meanwhile
            home.download(name, folder / name)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, filter(_RECORD.fullmatch, names)))


def records_folder(home: RemoteFolder) -> Path:
    """Where on this node the records of a run are kept, and what is made of them."""
    return cached_as("records", home.uri) / home.name
