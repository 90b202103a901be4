"""A data folder that appears in one rename, whole, or not at all.

Built next to its final place under a hidden name: a killed attempt is never taken for data, and of
two attempts at once the first to finish stays.
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
from gptray.files import check_writable, no_empty_folders, storing

_ABANDONED_SECONDS = 24 * 3600


@contextmanager
def building(data_dir: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and make it `data_dir` when the block ends well.

    Raises UserError for a folder that cannot be written, RunFailed where the disk takes no more;
    nothing of the attempt stays.
    """
    check_writable(data_dir.parent, key="storage_path")
    folder = _beside(data_dir)
    with no_empty_folders(data_dir.parent):
        with storing(data_dir):
            _remove_abandoned(data_dir)
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
        # Another attempt was faster: the same request, the same data.
        TokenData.open(data_dir).verify()
    except DamagedData:
        aside = _beside(data_dir)
        data_dir.rename(aside)
        folder.rename(data_dir)
        shutil.rmtree(aside)


def _beside(data_dir: Path) -> Path:
    return data_dir.with_name(f".{data_dir.name}.{uuid.uuid4().hex[:8]}")


def _remove_abandoned(data_dir: Path) -> None:
    """Remove what killed attempts at this folder left, once no living one can own it."""
    for path in data_dir.parent.glob(f".{data_dir.name}.*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path)
