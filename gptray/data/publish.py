"""Publishes a data folder atomically, by one rename.

It is built next to its final place under a hidden name, so a killed attempt is never taken for
data; of two concurrent attempts, the first to finish wins.
"""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptray.data.tokens import DamagedData, TokenData
from gptray.storage.files import check_writable, no_empty_folders, storing

_ABANDONED_SECONDS = 24 * 3600


@contextmanager
def building(data_dir: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; rename it to `data_dir` if the block succeeds.

    Raises UserError if the folder cannot be written, RunFailed if the disk is full; a failed
    attempt leaves nothing behind.
    """
    check_writable(data_dir.parent, key="storage_path")
    folder = _hidden_sibling(data_dir)
    with no_empty_folders(data_dir.parent):
        with storing(data_dir):
            # Attempts that were killed, once they are too old to be running.
            for path in data_dir.parent.glob(f".{data_dir.name}.*"):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path)
            folder.mkdir(parents=True)
        try:
            yield folder
            with storing(data_dir):
                _publish(folder, data_dir)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, data_dir: Path) -> None:
    try:
        folder.rename(data_dir)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    try:
        # Another attempt at the same request was faster; its data is the same.
        TokenData.open(data_dir).verify()
    except DamagedData:
        aside = _hidden_sibling(data_dir)
        data_dir.rename(aside)
        folder.rename(data_dir)
        shutil.rmtree(aside)


def _hidden_sibling(data_dir: Path) -> Path:
    return data_dir.with_name(f".{data_dir.name}.{uuid.uuid4().hex[:8]}")
