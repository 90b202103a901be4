"""Makes a run's local folder equal to a remote one: in an object store, or on the driver's node.

Local checkpoints with the same manifest are kept. For jobs that only read a run in an object store,
only its records are fetched.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gptray.jobs.folders.publisher import Home, Sent, is_hidden, version_of
from gptray.storage.files import cached_as, remove, storing
from gptray.storage.manifest import MANIFEST, files_damage
from gptray.storage.remote_folder import RemoteFolder
from gptray.training.checkpoint import checkpoint_step

log = logging.getLogger("gptray")

# How many files are fetched at a time.
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
    """Make a folder hold exactly these files of `home`; return the versions that both have.

    A checkpoint without a manifest is not fetched. ended: called when all other files are here;
    returns the runs below the folder whose checkpoints are not needed.

    Raises UserError if `home` cannot be read, RunFailed if the disk is full.
    """
    checkpoints = {one for name in names if (one := checkpoint_of(name))}
    wholes = {one for one in checkpoints if f"{one}/{MANIFEST}" in names}
    others = [name for name in names if not checkpoint_of(name)]
    _remove_all_but({*others, *wholes}, folder)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: home.download(name, folder / name), others))
    without = ended()
    here = [folder / name for name in others]
    # Of models only those whose run has ended, so that they are final.
    final = [one for one in here if one.parent.name != "model" or one.parents[1] in without]
    sent = Sent({path: version_of(path) for path in final})
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
    """The checkpoint (of a run or a sweep's trial) that a file or folder belongs to, or is."""
    path = PurePosixPath(name)
    found = [one for one in (path, *path.parents) if checkpoint_step(Path(one)) is not None]
    return found[-1].as_posix() if found else None


def fetch_checkpoint(place: Home, folder: Path, files: Iterable[str]) -> bytes | None:
    """Fetch a checkpoint unless it is here; return its manifest. files: names of its files."""
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
    """Remove all files and checkpoints except those named in `kept`, and hidden files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in kept or checkpoint_of(name) in kept or is_hidden(name):
            continue
        if path.is_file() or checkpoint_step(path) is not None:
            remove(path)


def fetch_records(home: RemoteFolder, names: Iterable[str], folder: Path) -> None:
    """Fetch only the records among a run's files into a local folder.

    Raises UserError if the store cannot be read, RunFailed if the disk is full.
    """
    with storing(folder):
        remove(folder)

    def fetch(name: str) -> None:
        with suppress(FileNotFoundError):  # removed meanwhile
            home.download(name, folder / name)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, filter(_RECORD.fullmatch, names)))


def records_folder(home: RemoteFolder) -> Path:
    """The local folder for a run's fetched records, and for what is derived from them."""
    return cached_as("records", home.uri) / home.name
