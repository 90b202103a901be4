"""A lock that lets one driver at a time work in a run's folder. Imports neither torch nor Ray."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptray.config import UserError
from gptray.storage.files import no_empty_folders, open_lock, storing

LOCK = ".driver.lock"


@contextmanager
def held(folder: Path, *, busy: str | None = None) -> Iterator[None]:
    """Lock a folder for one driver; the OS releases the lock when the process dies.

    A folder created here is removed at the end if it holds nothing else, as after a failed start.

    Raises UserError, with the message `busy`, if another process holds it; RunFailed if the disk
    is full or not writable.
    """
    lock = folder / LOCK
    with no_empty_folders(folder):
        with storing(lock):
            folder.mkdir(parents=True, exist_ok=True)
            file = open_lock(lock)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = busy or f"another process is training the run {folder}"
                raise UserError(message) from None
            try:
                yield
            finally:
                with suppress(OSError):  # a lost mount was reported already
                    if [path.name for path in folder.iterdir()] == [lock.name]:
                        lock.unlink()


def is_held(folder: Path) -> bool:
    """Whether a driver is at work in a folder; does not lock it."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # its driver just ended and removed the folder
        return False
    except BlockingIOError:
        return True
    return False
