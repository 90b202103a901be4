"""API keys: read from a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from gptray.config import UserError


def read_keys(path: str) -> list[str]:
    """Digests of the keys in a file, one on each line. Raises UserError if it holds none."""
    place = f"serve.api_key_file={path}"
    try:
        keys = Path(path).expanduser().read_text("utf-8").split()
    except UnicodeDecodeError:
        raise UserError(f"{place}: it is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    if not keys:
        raise UserError(f"{place}: it holds no key")
    return [_digest(key) for key in keys]


def lets_in(digests: Sequence[str], authorization: str) -> bool:
    """Whether an Authorization header carries one of the keys; everything does where none is."""
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip()) if scheme.lower() == "bearer" else ""
    # All are compared, so that the time does not tell which.
    return not digests or any([hmac.compare_digest(given, digest) for digest in digests])


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
