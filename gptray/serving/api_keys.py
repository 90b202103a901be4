"""API keys: read from a file that may change, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import time
from collections.abc import Sequence

from gptray.config import UserError
from gptray.storage.files import expanded

log = logging.getLogger("gptray")

# The shortest time between two checks of the file.
CHECK_S = 1.0


def read_keys(path: str) -> list[str]:
    """Digests of the keys in a file, one per line; lines that begin with # are comments.

    Raises UserError if the file has no key, or a line that is not a valid key.
    """
    place, file = f"serve.api_key_file={path}", expanded(path)
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        is_open = file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    except UnicodeDecodeError:
        raise UserError(f"{place}: it is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"{place}: it has no key")
    for number, line in enumerate(lines, start=1):
        if line in keys and not (line.isascii() and line.isprintable() and " " not in line):
            raise UserError(
                f"{place}: line {number}: a key must be printable ASCII without spaces; comments "
                "begin with #"
            )
    if is_open:
        log.warning("%s is readable by other users of this machine; run chmod 600 %s", place, file)
    return [_digest(key) for key in keys]


class Keys:
    """The accepted keys. Changes to the file take effect within a second, without a restart.

    digests: of the initial keys. While the file is unreadable or invalid, the last keys stay valid.
    """

    def __init__(self, path: str, digests: Sequence[str]) -> None:
        self._path, self._digests = path, tuple(digests)
        self._seen: tuple[int, ...] | None = ()  # the file's `_state` when it was last read
        self._check_at = 0.0

    def accept(self, authorization: str) -> bool:
        """Whether an Authorization header carries one of the keys."""
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_S
            self._reread_if_changed()
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        # Compare with every key, so that the time does not reveal which one matched.
        return any([hmac.compare_digest(given, digest) for digest in self._digests])

    def _reread_if_changed(self) -> None:
        """Read the file if it has changed. Problems with it are logged once."""
        seen = _state(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._digests = tuple(read_keys(self._path))
        except UserError as error:
            log.warning("%s; the previous keys stay in use", error)


def _state(path: str) -> tuple[int, ...] | None:
    """A value that changes whenever the file is replaced or written; None if it does not exist."""
    try:
        found = os.stat(expanded(path))
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
