"""Prepared text in object storage: published once, and fetched by a node that has none."""

from __future__ import annotations

import logging
from pathlib import Path

from gptray.config import Config
from gptray.data.publish import building
from gptray.files import is_uri
from gptray.manifest import MANIFEST
from gptray.node_cache import hold, make_room, set_published
from gptray.remote_folder import RemoteFolder

log = logging.getLogger("gptray")


def bring_data(config: Config, data_dir: Path) -> None:
    """Fetch prepared text from the storage_path, if that is an object store that has it.

    Raises UserError, RunFailed.
    """
    place = _data_home(config, data_dir)
    if place is None:
        return
    hold(data_dir)
    make_room()
    if data_dir.exists() or MANIFEST not in place.files():
        return
    log.info("fetching %s", place)
    with building(data_dir) as folder:
        for name in place.files(deep=True):
            place.download(name, folder / name)


def publish_data(config: Config, data_dir: Path) -> None:
    """Publish prepared text, manifest last, where storage_path is an object store without it."""
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
