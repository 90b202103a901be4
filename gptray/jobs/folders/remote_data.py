"""Prepared text in object storage: published once, and fetched by nodes that do not have it."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path

from gptray.config import Config
from gptray.config.names import PREPARED
from gptray.data.publish import building
from gptray.data.tokens import DamagedData, TokenData
from gptray.storage.files import is_uri, open_lock, remove, storing
from gptray.storage.manifest import MANIFEST
from gptray.storage.node_cache import hold, make_room, set_published, storage_folder
from gptray.storage.remote_folder import RemoteFolder

log = logging.getLogger("gptray")


def download_data(config: Config, data_dir: Path) -> None:
    """Fetch prepared text from storage_path, if that is an object store that has it.

    Raises UserError, RunFailed.
    """
    place = _data_home(config, data_dir)
    if place is not None:
        _fetch(place, data_dir)


def tokens_on_node(config: Config, data_dir: Path) -> Path:
    """This node's folder for text that is in `data_dir` at the driver.

    Raises UserError, RunFailed.
    """
    home = config.storage_path
    return tokens_here(home, data_dir.name) if is_uri(home) else data_dir


def tokens_here(storage_path: str, name: str, *, fetches: bool = True) -> Path:
    """This node's folder for text that the driver has published, by its folder's name there.

    fetches: whether to fetch the text if it is not here; if not, another process does.

    Raises UserError, RunFailed.
    """
    data_dir = storage_folder(storage_path) / PREPARED / name
    if not fetches:
        hold(data_dir)
        return data_dir
    with storing(data_dir):
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(data_dir.with_name(f"{name}.lock"))
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the node's processes fetches, the others wait
        try:
            TokenData.open(data_dir)
        except DamagedData:
            remove(data_dir)
        _fetch(RemoteFolder(storage_path) / PREPARED / name, data_dir)
        set_published(data_dir, True)
    return data_dir


def _fetch(place: RemoteFolder, data_dir: Path) -> None:
    hold(data_dir)
    make_room()
    if data_dir.exists() or MANIFEST not in place.files():
        return
    log.info("fetching %s", place)
    with building(data_dir) as folder:
        for name in place.files(deep=True):
            place.download(name, folder / name)


def publish_data(config: Config, data_dir: Path) -> None:
    """Publish prepared text, manifest last, if storage_path is an object store without it."""
    place = _data_home(config, data_dir)
    if place is None:
        return
    if MANIFEST not in place.files():
        files = [path for path in data_dir.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            place.upload(path, path.relative_to(data_dir).as_posix())
    set_published(data_dir, True)


def _data_home(config: Config, data_dir: Path) -> RemoteFolder | None:
    if not is_uri(config.storage_path):
        return None
    return RemoteFolder(config.storage_path) / data_dir.parent.name / data_dir.name
