"""The file systems that pyarrow knows, object stores among them, and calls to them.

Credentials, region and endpoint are those of the environment, as pyarrow takes them
(AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...). Calls that meet a busy or slow
store are repeated.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from gptray.config import UserError
from gptray.hub import first_line

if TYPE_CHECKING:  # only a command that names a store waits for it to load
    import pyarrow as pa
    from pyarrow import fs

log = logging.getLogger("gptray")

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# Stores in which a file is not seen before it is whole.
WRITABLE = ("s3", "gs", "gcs", "abfs", "abfss")
# What a URI may hold besides letters and digits; a percent sign quotes already.
_OF_URIS = "%:/?#[]@!$&'()*+,;=~"
# What stores say of credentials that are missing, wrong or not enough.
_DENIED = ("ACCESS_DENIED", "Forbidden", "403", "credential", "INVALID_ACCESS_KEY", "SIGNATURE")
# Between the tries of a call, and when the wait is told.
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_TELL_S = 3.0

T = TypeVar("T")


def scheme_of(uri: str) -> str:
    """s3 of s3://bucket/key, say."""
    return uri.partition("://")[0].lower()


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """What opens a URI, and the path in it. Raises UserError for one that cannot be reached."""
    from pyarrow.fs import FileSystem

    scheme = scheme_of(uri)
    if scheme not in SCHEMES:
        raise UserError(f"{uri}: {_other_scheme(scheme)}")
    opened = uri
    if scheme == "s3" and "allow_delayed_open" not in uri:  # a small file is one call, not three
        opened += ("&" if "?" in uri else "?") + "allow_delayed_open=true"
    try:
        opened = quote(opened, safe=_OF_URIS)  # pyarrow takes letters of ASCII alone
        filesystem, path = persistently(lambda: FileSystem.from_uri(opened))
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {reason(error)}") from None
    return filesystem, path


def _other_scheme(scheme: str) -> str:
    """What to do instead of naming a place that is not read from."""
    if scheme == "hf":
        return (
            "files on Hugging Face's hub cannot be read directly; download them first (hf "
            "download OWNER/NAME --repo-type dataset --local-dir FOLDER) and name the folder"
        )
    if scheme in ("http", "https", "ftp"):
        return "download the file first and name it by its path"
    known = " ".join(f"{name}://" for name in SCHEMES)
    return f"unknown scheme {scheme}://; known: {known}, or a local path"


def why_not_written(uri: str) -> str | None:
    """Why nothing is written to where a URI leads; None if it can be."""
    scheme = scheme_of(uri)
    if scheme in WRITABLE:
        return None
    if scheme not in SCHEMES:
        return _other_scheme(scheme)
    places = ", ".join(f"{name}://" for name in WRITABLE)
    return f"{scheme}:// is read-only; give a folder, or one of {places}"


def reason(error: Exception) -> str:
    """What a store says, in one line, and where it takes credentials from if it refuses them."""
    line = first_line(error)
    if _is_denied(error):
        return f"{line} (credentials come from the environment, such as AWS_PROFILE)"
    return line


def _is_denied(error: Exception) -> bool:
    return any(word in str(error) for word in _DENIED)


def persistently(call: Callable[[], T]) -> T:
    """What a call of a store returns; one that fails in passing is made again, for some seconds.

    pyarrow repeats calls too, but not a small read to which a store answers that it is busy: the
    answer is larger than the read. A long wait is told once. Raises OSError.
    """
    began, is_told = time.monotonic(), False
    for pause in _PAUSES_S:
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            if _is_denied(error):
                raise
            if not is_told and time.monotonic() - began > _TELL_S:
                log.warning("the store is not answering yet; retrying: %s", reason(error))
                is_told = True
            time.sleep(pause)
    return call()


def open_persistently(uri: str, path: str) -> pa.NativeFile:
    """Open a file of the file system that a URI names, for reads that are made again if need be.

    Raises OSError.
    """
    import pyarrow as pa

    return pa.PythonFile(_PersistentFile(uri, path), mode="r")


class _PersistentFile(io.RawIOBase):
    def __init__(self, uri: str, path: str) -> None:
        filesystem, _ = file_system(uri)
        self._file = persistently(lambda: filesystem.open_input_file(path))
        self._offset, self._size = 0, int(self._file.size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        self._offset = start + offset
        return self._offset

    def read(self, size: int = -1) -> bytes:
        size = self._size - self._offset if size < 0 else size
        block = bytes(persistently(lambda: self._file.read_at(size, self._offset)))
        self._offset += len(block)
        return block

    def close(self) -> None:
        self._file.close()
        super().close()
