"""Folders named by URIs, in object stores and other file systems that pyarrow supports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.storage.files import CannotWrite, replacing, storing
from gptray.storage.store_access import file_system, reason, with_retries

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file in a listing. modified: ns, by the store's clock."""

    name: str
    size: int
    modified: int


@dataclass(frozen=True)
class RemoteFolder:
    """The folder that a URI names; it need not exist yet."""

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
        """The folder above; None for a bucket or a root."""
        head, mark, query = self.uri.partition("?")
        above, _, _ = head.rstrip("/").rpartition("/")
        return RemoteFolder(f"{above}{mark}{query}") if above.partition("://")[2] else None

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        filesystem, path = file_system(self.uri)
        return filesystem, path.rstrip("/")

    def files(self, *, deep: bool = False) -> dict[str, StoredFile]:
        """The files in it by name; deep: also those in its folders. Raises UserError."""
        return {
            name: StoredFile(name, info.size, info.mtime_ns or 0)
            for name, info in self._listed(deep).items()
            if info.is_file
        }

    def folders(self) -> list[str]:
        """The names of the folders in it. Raises UserError."""
        return [name for name, info in self._listed(False).items() if not info.is_file]

    def _listed(self, deep: bool) -> dict[str, fs.FileInfo]:
        from pyarrow.fs import FileSelector

        filesystem, path = self._place
        selector = FileSelector(path, recursive=deep, allow_not_found=True)
        with self._read():
            infos = with_retries(lambda: filesystem.get_file_info(selector))
        return {info.path[len(path) :].lstrip("/"): info for info in infos}

    def download(self, name: str, target: Path) -> None:
        """Copy a file from here, atomically. Raises UserError, or RunFailed if the disk is full."""
        filesystem, path = self._place
        with self._read():
            source = with_retries(lambda: filesystem.open_input_file(f"{path}/{name}"))
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with source, storing(target), replacing(target) as draft, draft.open("wb") as file:
            while block := self._block(source, file.tell()):
                file.write(block)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None if it does not exist. Raises UserError."""
        filesystem, path = self._place
        with self._read(), suppress(FileNotFoundError):
            file = with_retries(lambda: filesystem.open_input_file(f"{path}/{name}"))
            return with_retries(lambda: bytes(file.read_at(file.size(), 0)))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file, atomically. Raises CannotWrite."""
        filesystem, path = self._place

        def put() -> None:
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(content)

        with self._written(name):
            with_retries(put)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file to here, atomically. Raises CannotWrite."""
        filesystem, path = self._place
        target = f"{path}/{name}"

        def put() -> None:
            with source.open("rb") as file, filesystem.open_output_stream(target) as stream:
                try:
                    while block := file.read(_BLOCK_BYTES):
                        stream.write(block)
                except OSError:  # closing the stream publishes the incomplete file
                    stream.close()
                    filesystem.delete_file(target)
                    raise

        with self._written(name):
            with_retries(put)

    def remove(self, name: str) -> None:
        """Remove a file if it exists. Raises CannotWrite."""
        filesystem, path = self._place
        with self._written(name), suppress(FileNotFoundError):
            with_retries(lambda: filesystem.delete_file(f"{path}/{name}"))

    def remove_all(self) -> None:
        """Remove the folder and its contents if it exists. Raises CannotWrite."""
        filesystem, path = self._place
        with self._written(""), suppress(FileNotFoundError):
            with_retries(lambda: filesystem.delete_dir(path))

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
            return with_retries(lambda: bytes(source.read_at(_BLOCK_BYTES, offset)))

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Turn errors into UserError that names the folder; FileNotFoundError passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.uri}: cannot be read: {reason(error)}") from None


def no_such_folder(place: RemoteFolder) -> UserError:
    """The error for a folder that does not exist; suggests the nearest name next to it."""
    near = nearest(place.name, place.parent.folders()) if place.parent else None
    known = str(place.parent / near) if place.parent and near else None
    return UserError(f"{place}: no such folder{did_you_mean(known)}")
