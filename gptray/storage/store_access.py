"""Access to pyarrow's file systems, including object stores, with retries.

pyarrow takes credentials, region and endpoint from the environment (AWS_ENDPOINT_URL, AWS_PROFILE,
GOOGLE_APPLICATION_CREDENTIALS, ...). Calls to a busy or slow store are retried.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from gptray.config import UserError
from gptray.wording import first_line

if TYPE_CHECKING:  # imported only by commands that name a store
    import pyarrow as pa
    from pyarrow import fs

log = logging.getLogger("gptray")

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# Stores in which files appear atomically.
WRITABLE = ("s3", "gs", "gcs", "abfs", "abfss")
# Characters not to quote in a URI, besides letters and digits; a percent sign already quotes.
_OF_URIS = "%:/?#[]@!$&'()*+,;=~"
# pyarrow's options: a small file in S3 is one call, not three; Google's client gives up after ten
# seconds, not fifteen silent minutes that no signal ends.
_OPTIONS = {
    "s3": "allow_delayed_open=true",
    "gs": "retry_limit_seconds=10",
    "gcs": "retry_limit_seconds=10",
}
# Words in stores' errors about missing, wrong or insufficient credentials.
_DENIED = (
    *("ACCESS_DENIED", "Forbidden", "403", "credential", "INVALID_ACCESS_KEY", "SIGNATURE"),
    "OAuth2 access token",
)
# Pauses between tries, and the wait after which to log a warning.
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_TELL_S = 3.0

T = TypeVar("T")


def scheme_of(uri: str) -> str:
    """The scheme of a URI, such as s3 for s3://bucket/key."""
    return uri.partition("://")[0].lower()


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it. Raises UserError if it cannot be reached."""
    from pyarrow.fs import FileSystem

    scheme = scheme_of(uri)
    if scheme not in SCHEMES:
        raise UserError(f"{uri}: {_other_scheme(scheme)}")
    opened = uri
    option, _, value = _OPTIONS.get(scheme, "").partition("=")
    if option and option not in uri:
        opened += f"{'&' if '?' in uri else '?'}{option}={value}"
    try:
        opened = quote(opened, safe=_OF_URIS)  # pyarrow accepts only ASCII
        filesystem, path = with_retries(lambda: FileSystem.from_uri(opened))
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {reason(error)}") from None
    return filesystem, path


def _other_scheme(scheme: str) -> str:
    """What to do about a scheme that cannot be read."""
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
    """Why gptray cannot write to a URI; None if it can."""
    scheme = scheme_of(uri)
    if scheme in WRITABLE:
        return None
    if scheme not in SCHEMES:
        return _other_scheme(scheme)
    places = ", ".join(f"{name}://" for name in WRITABLE)
    return f"{scheme}:// is read-only; give a folder, or one of {places}"


def reason(error: Exception) -> str:
    """A store's error in one line, with the source of credentials if it denied access."""
    line = first_line(error)
    if _is_denied(error):
        return (
            f"{line} (credentials come from the environment, such as AWS_PROFILE or "
            "GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return line


def _is_denied(error: Exception) -> bool:
    return any(word in str(error) for word in _DENIED)


def with_retries(call: Callable[[], T]) -> T:
    """Make a call to a store; retry it for some seconds if it fails temporarily.

    pyarrow retries too, but not a small read that a busy store answers with an error larger than
    the read. A long wait is logged once. Raises OSError.
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


def open_with_retries(uri: str, path: str) -> pa.NativeFile:
    """Open a file in the file system of a URI; its reads are retried. Raises OSError."""
    import pyarrow as pa

    return pa.PythonFile(_RetryingFile(uri, path), mode="r")


class _RetryingFile(io.RawIOBase):
    def __init__(self, uri: str, path: str) -> None:
        filesystem, _ = file_system(uri)
        self._file = with_retries(lambda: filesystem.open_input_file(path))
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
        block = bytes(with_retries(lambda: self._file.read_at(size, self._offset)))
        self._offset += len(block)
        return block

    def close(self) -> None:
        self._file.close()
        super().close()
