"""Finds the files that `data.source` names: files, folders, globs and lists of them, or URIs.

Opens them as decompressed byte streams; `corpus` reads their text. Local names need not be UTF-8;
URIs are listed and opened by a pyarrow file system.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import cast

import pyarrow as pa

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.data.encoding import codec_of
from gptray.data.folders import (
    WILDCARD,
    LocalFile,
    as_spelled,
    file_at,
    file_identity,
    files_below,
    glob_files,
    names_in,
    remote_files,
    shown,
    unique_files,
)
from gptray.storage.files import absolute
from gptray.storage.path_mistakes import uri_slip
from gptray.storage.store_access import file_system, open_with_retries, scheme_of, with_retries
from gptray.wording import count

BUILTIN = "builtin"
FORMATS = {
    ".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_READABLE = f"readable: {' '.join(FORMATS)}, also {' '.join(COMPRESSIONS)} of all but .parquet"
BUFFER_BYTES = 1 << 20
# Files by which a folder of `save_to_disk` of Hugging Face's datasets is known.
_SAVED_DATA = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})
_TO_PARQUET = "write its data with to_parquet, a file per split"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    uri: the URI that opens its file system; None: the local one.
    encoding: its text's, as `codec_of` returns it; None: UTF-8, unless a byte order mark differs.
    """

    path: str
    size: int  # bytes, as stored
    modified: int  # ns
    uri: str | None = None
    encoding: str | None = None

    @property
    def name(self) -> str:
        """The name that messages and manifests use."""
        return shown(self.path) if self.uri is None else f"{scheme_of(self.uri)}://{self.path}"

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())

    @property
    def format(self) -> str:
        """txt, jsonl, json, csv or parquet."""
        kind = _format(self.path)
        assert kind is not None, self.path
        return kind

    @property
    def has_tabs(self) -> bool:
        """Whether tabs separate the columns of a CSV file."""
        return ".tsv" in [suffix.lower() for suffix in PurePosixPath(self.path).suffixes[-2:]]

    @property
    def place(self) -> str:
        """The same for all names of one file, including hard and symbolic links."""
        return file_identity(self.path) if self.uri is None else self.name

    def changed(self) -> bool:
        """Whether the file has changed since it was listed."""
        if self.uri is None:
            return file_at(self.path) != LocalFile(self.path, self.size, self.modified)
        filesystem, _ = file_system(self.uri)
        info = with_retries(lambda: filesystem.get_file_info(self.path))
        # Some stores round one file's time to seconds, but not those in a listing.
        second = 10**9
        modified = (info.mtime_ns or 0) // second
        return (info.size, modified) != (self.size, self.modified // second)

    def open(self, start: int = 0) -> io.BufferedReader:
        """Open as a stream of bytes from `start`, which must be 0 for a compressed file."""
        raw = self.open_stored()
        try:
            if self.compression is None:
                raw.seek(start)
            else:
                assert start == 0, "a compressed stream can only be read from its beginning"
                raw = pa.CompressedInputStream(raw, self.compression)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be opened: {_reason(error)}") from None
        # pyarrow's files work with io, but their stubs do not say so.
        return io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES)

    def open_stored(self) -> pa.NativeFile:
        """Open the bytes as stored, without decompressing them."""
        try:
            if self.uri is None:
                return pa.OSFile(os.fsencode(self.path))
            return open_with_retries(self.uri, self.path)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be opened: {_reason(error)}") from None


@dataclass(frozen=True)
class Source:
    """The text that one key of the config names."""

    key: str  # data.source, say
    files: tuple[SourceFile, ...]  # none: builtin


def find_files(
    source: str | Sequence[str], *, key: str = "data.source", encoding: str | None = None
) -> list[SourceFile]:
    """List the files that `source` names, each once, in the order given; a folder's by path.

    key: the config's name for `source`, for messages. encoding: data.encoding.

    Raises UserError with all problems, one line each.
    """
    found: dict[str, SourceFile] = {}
    problems = []
    for entry in [source] if isinstance(source, str) else source:
        try:
            for file in _expand(entry):
                found.setdefault(file.path if file.uri is None else file.name, file)
        except UserError as error:
            problems.append(f"{key}={error}")
    if problems:
        raise UserError("\n".join(problems))
    if not found:
        raise UserError(f"{key} is an empty list; name a file or a folder")
    local, codec = (
        set(unique_files(p for p, file in found.items() if file.uri is None)),
        codec_of(encoding),
    )
    return [
        replace(file, encoding=codec)
        for name, file in found.items()
        if file.uri is not None or name in local
    ]


def file_sha256(file: SourceFile) -> str:
    """The sha256 of the file's bytes as stored, not decompressed."""
    digest = hashlib.sha256()
    with file.open_stored() as stream:
        while block := stream.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _format(path: str) -> str | None:
    name = path.rpartition("/")[2].lower().lstrip(".")
    suffixes = [f".{suffix}" for suffix in name.split(".")[1:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        # Parquet has its own compression; a compressed file could not be read by row groups.
        return None if kind == "parquet" else kind
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _expand(entry: str) -> list[SourceFile]:
    if entry == BUILTIN:
        raise UserError("builtin cannot be listed with files")
    if "://" in entry:
        return _expand_remote(entry)
    if not entry.isprintable() and shown(entry) != entry:
        raise UserError(f"{shown(entry)}: not UTF-8; name the file by its folder or by a glob")
    path = as_spelled(str(absolute(entry)))
    if os.path.isdir(path):
        return _from_folder(entry, path)
    if not os.path.lexists(path) and WILDCARD.search(entry):
        return _readable(entry, [_local(match) for match in glob_files(path)])
    if not os.path.exists(path):
        raise UserError(f"{shown(entry)}: {_unlisted(entry) or _missing(path)}")
    if not os.path.isfile(path):
        raise UserError(f"{shown(entry)}: neither a file nor a folder")
    return _readable(entry, [_local(path)])


def _unlisted(entry: str) -> str:
    """What is wrong with names of files that only commas join; "" for another entry."""
    names = [name.strip() for name in entry.split(",")]
    if len(names) < 2 or not all(os.path.exists(absolute(name)) for name in names):
        return ""
    return f"there is no such file; a list is written '[{', '.join(names)}]'"


def _missing(path: str) -> str:
    if os.path.islink(path):
        return f"a link to {shown(os.readlink(path))}, which does not exist"
    folder, name = os.path.split(path)
    if slip := next(filter(None, map(uri_slip, folder.split("/"))), None):
        return f"there is no such file or folder; {slip}"
    if not os.path.isdir(folder):
        return f"there is no such file or folder ({folder} is not a folder)"
    return f"there is no such file or folder{did_you_mean(nearest(name, names_in(folder)))}"


def _from_folder(entry: str, path: str) -> list[SourceFile]:
    try:
        found = list(files_below(path))
    except OSError as error:
        where = shown(str(error.filename or path))
        raise UserError(f"{shown(entry)}: {where} cannot be listed: {_reason(error)}") from None
    names = set(os.listdir(path))
    if any(mark <= names for mark in _SAVED_DATA):
        raise UserError(f"{shown(entry)}: datasets.save_to_disk wrote this folder; {_TO_PARQUET}")
    readable = [one for one in found if _format(one) is not None]
    return _readable(entry, _of_folder(entry, [_local(one) for one in readable], len(found)))


def _local(path: str) -> SourceFile:
    file = file_at(path)
    if file is None and not os.path.exists(path):
        raise UserError(f"{shown(path)}: {_missing(path)}")
    if file is None:
        raise UserError(f"{shown(path)}: not a file that can be read")
    return SourceFile(*file)


def _of_folder(entry: str, readable: list[SourceFile], others: int) -> list[SourceFile]:
    if not readable:
        raise UserError(
            f"{shown(entry)}: the folder holds no file that can be read ({_READABLE}); "
            f"it holds {count(others, 'other file')}"
        )
    return readable


def _expand_remote(entry: str) -> list[SourceFile]:
    infos, uri, is_folder = remote_files(entry)
    files = [SourceFile(info.path, info.size, info.mtime_ns or 0, uri) for info in infos]
    if is_folder:
        readable = [file for file in files if _format(file.path) is not None]
        files = _of_folder(entry, readable, len(files))
    return _readable(entry, files)


def _readable(entry: str, files: Sequence[SourceFile]) -> list[SourceFile]:
    if not files:
        raise UserError(f"{shown(entry)}: no file matches")
    for file in files:
        if _format(file.path) is None:
            suffix = PurePosixPath(file.path).suffix
            near = did_you_mean(nearest(suffix, FORMATS))
            if file.compression:
                suffix, near = "".join(PurePosixPath(file.path).suffixes[-2:]), ""
            raise UserError(
                f"{file.name}: cannot read {shown(suffix) or 'a name without extension'}"
                f"{near} ({_READABLE})"
            )
    return sorted(files, key=lambda file: file.path)
