"""API keys: read from a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Sequence
from pathlib import Path

from gptray.config import UserError

log = logging.getLogger("gptray")


def read_keys(path: str) -> list[str]:
    """Digests of the keys in a file: one a line; a line that begins with # is a comment.

    Raises UserError if the file has no key, or a line that no client could send.
    """
    place, file = f"serve.api_key_file={path}", Path(path).expanduser()
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
                f"{place}: line {number}: a key is printable ASCII without spaces; comments begin "
                "with #"
            )
    if is_open:
        log.warning("%s can be read by other users of this machine: chmod 600 %s", place, file)
    return [_digest(key) for key in keys]


def lets_in(digests: Sequence[str], authorization: str) -> bool:
    """Whether an Authorization header carries one of the keys; everything does where none is."""
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip()) if scheme.lower() == "bearer" else ""
    # All are compared, so that the time does not tell which.
    return not digests or any([hmac.compare_digest(given, digest) for digest in digests])


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
