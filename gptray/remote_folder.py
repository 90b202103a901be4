"""Folders that a URI names, in any file system that pyarrow knows: object stores and others.

Credentials, region and endpoint are those of the environment, as pyarrow takes them
(AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...). Calls that meet a busy or slow
store are repeated.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.files import CannotWrite, replacing, storing

log = logging.getLogger("gptray")

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# Stores in which a file is not seen before it is whole.
WRITABLE = ("s3", "gs", "gcs", "abfs", "abfss")
# What stores say of credentials that are missing, wrong or not enough.
_DENIED = ("ACCESS_DENIED", "Forbidden", "403", "credential", "INVALID_ACCESS_KEY", "SIGNATURE")
_BLOCK_BYTES = 8 << 20
# Between the tries of a call.
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)

T = TypeVar("T")


def scheme_of(uri: str) -> str:
    """s3 of s3://bucket/key, say."""
    return uri.partition("://")[0].lower()


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """What opens a URI, and the path in it. Raises UserError for one that cannot be reached."""
    scheme = scheme_of(uri)
    if scheme not in SCHEMES:
        raise UserError(f"{uri}: {_other_scheme(scheme)}")
    try:
        filesystem, path = persistently(lambda: fs.FileSystem.from_uri(uri))
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {reason(error)}") from None
    return filesystem, path


def _other_scheme(scheme: str) -> str:
    """What to do instead of naming a place that is not read from."""
    if scheme == "hf":
        return (
            "Hugging Face's hub is not read directly; download it first (hf download OWNER/NAME "
            "--repo-type dataset --local-dir FOLDER) and name the folder"
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
    return f"{scheme}:// is only read from; give a folder, or one of {places}"


def reason(error: Exception) -> str:
    """What a store says, in one line, and where it takes credentials from if it refuses them."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_denied(error):
        return f"{line} (credentials are those of the environment, such as AWS_PROFILE)"
    return line


def _is_denied(error: Exception) -> bool:
    return any(word in str(error) for word in _DENIED)


def persistently(call: Callable[[], T]) -> T:
    """What a call of a store returns; one that fails in passing is made again, for some seconds.

    pyarrow repeats calls too, but not a small read to which a store answers that it is busy: the
    answer is larger than the read. Raises OSError.
    """
    for pause in _PAUSES_S:
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            if _is_denied(error):
                raise
            log.debug("asking again in %.1f s: %s", pause, error)
            time.sleep(pause)
    return call()


def open_persistently(uri: str, path: str) -> pa.NativeFile:
    """Open a file of the file system that a URI names, for reads that are made again if need be.

    Raises OSError.
    """
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


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing has it. modified: ns, by the store's clock."""

    name: str
    size: int
    modified: int


@dataclass(frozen=True)
class RemoteFolder:
    """The folder that a URI names; it need not be there yet."""

    uri: str

    def __truediv__(self, name: str) -> RemoteFolder:
        head, mark, query = self.uri.partition("?")
        return RemoteFolder(f"{head.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of its path, or the bucket."""
        return self.uri.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemoteFolder | None:
        """None: this is a bucket or a root."""
        head, mark, query = self.uri.partition("?")
        above, _, _ = head.rstrip("/").rpartition("/")
        return RemoteFolder(f"{above}{mark}{query}") if above.partition("://")[2] else None

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        filesystem, path = file_system(self.uri)
        return filesystem, path.rstrip("/")

    def files(self) -> dict[str, StoredFile]:
        """The files in it by name, those of its folders left out. Raises UserError."""
        return {
            name: StoredFile(name, info.size, info.mtime_ns or 0)
            for name, info in self._listed().items()
            if info.is_file
        }

    def folders(self) -> list[str]:
        """The names of the folders in it. Raises UserError."""
        return [name for name, info in self._listed().items() if info.type == fs.FileType.Directory]

    def _listed(self) -> dict[str, fs.FileInfo]:
        filesystem, path = self._place
        selector = fs.FileSelector(path, allow_not_found=True)
        with self._read():
            infos = persistently(lambda: filesystem.get_file_info(selector))
        return {info.path[len(path) :].lstrip("/"): info for info in infos}

    def download(self, name: str, target: Path) -> None:
        """Copy a file from here; it appears whole. Raises UserError; RunFailed without room."""
        filesystem, path = self._place
        with self._read():
            source = persistently(lambda: filesystem.open_input_file(f"{path}/{name}"))
        with source, storing(target), replacing(target) as draft, draft.open("wb") as file:
            while block := self._block(source, file.tell()):
                file.write(block)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None if it is not there. Raises UserError."""
        filesystem, path = self._place
        with self._read(), suppress(FileNotFoundError):
            file = persistently(lambda: filesystem.open_input_file(f"{path}/{name}"))
            return persistently(lambda: bytes(file.read_at(file.size(), 0)))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Make a file, or replace it; it appears whole. Raises CannotWrite."""
        filesystem, path = self._place

        def put() -> None:
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(content)

        with self._written(name):
            persistently(put)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file to here; it appears whole. Raises CannotWrite."""
        filesystem, path = self._place
        target = f"{path}/{name}"

        def put() -> None:
            with source.open("rb") as file, filesystem.open_output_stream(target) as stream:
                try:
                    while block := file.read(_BLOCK_BYTES):
                        stream.write(block)
                except OSError:  # closing the stream shows what there is
                    stream.close()
                    filesystem.delete_file(target)
                    raise

        with self._written(name):
            persistently(put)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises CannotWrite."""
        filesystem, path = self._place
        with self._written(name), suppress(FileNotFoundError):
            persistently(lambda: filesystem.delete_file(f"{path}/{name}"))

    @contextmanager
    def _written(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotWrite(
                f"cannot write {self / name}: {reason(error)}; the same command resumes once it "
                "can be written"
            ) from None

    def _block(self, source: pa.NativeFile, offset: int) -> bytes:
        with self._read():
            return persistently(lambda: bytes(source.read_at(_BLOCK_BYTES, offset)))

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Say which folder failed to be read, and why. A missing file stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.uri}: cannot be read: {reason(error)}") from None


def no_such_folder(place: RemoteFolder) -> UserError:
    """The error for a folder that is not there; names the nearest one next to it."""
    near = nearest(place.name, place.parent.folders()) if place.parent else None
    known = [str(place.parent / near)] if place.parent and near else []
    return UserError(f"{place}: no such folder{did_you_mean(known)}")
