"""What `data.source` names: files, folders, globs and lists of them, on any pyarrow file system.

Finds files and opens them as byte streams, decompressed; it reads no text (`corpus` does).
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from pyarrow import fs

from gptray.config import UserError
from gptray.suggest import did_you_mean, nearest

BUILTIN = "builtin"
FORMATS = {".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus. `uri` is what opens its file system; None: the local one."""

    path: str
    size: int  # bytes, as stored
    modified: int  # ns
    uri: str | None = None

    @property
    def name(self) -> str:
        """As messages and manifests call it."""
        return self.path if self.uri is None else f"{self.uri.partition('://')[0]}://{self.path}"

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(PurePosixPath(self.path).suffix.lower())

    @property
    def format(self) -> str:
        """txt, jsonl, csv or parquet."""
        kind = _format(self.path)
        assert kind is not None, self.path
        return kind

    def changed(self) -> bool:
        """Whether the file is no more the one that was listed."""
        info = self.filesystem.get_file_info(self.path)
        return (info.size, info.mtime_ns or 0) != (self.size, self.modified)

    @property
    def filesystem(self) -> fs.FileSystem:
        return _filesystem(self.uri)[0]

    def open(self, start: int = 0) -> BinaryIO:
        """Open as bytes from `start`, which a compressed file cannot choose."""
        try:
            if self.compression is None:
                raw = self.filesystem.open_input_file(self.path)
                raw.seek(start)
            else:
                assert start == 0, "a compressed stream is read from its beginning"
                raw = self.filesystem.open_input_stream(self.path, compression=self.compression)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be opened: {error}") from None
        # pyarrow's files are file-like enough for io, but their stubs do not say so.
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES))


def find_files(source: str | Sequence[str], *, key: str = "data.source") -> list[SourceFile]:
    """List the files that `source` names, each once, in the order given; a folder's by path.

    `key` is the config's name for it, in messages.

    Raises UserError with all that is wrong, one line each.
    """
    found: dict[str, SourceFile] = {}
    problems = []
    for entry in [source] if isinstance(source, str) else source:
        try:
            for file in _expand(entry):
                found.setdefault(file.name, file)
        except UserError as error:
            problems.append(f"{key}={error}")
    if problems:
        raise UserError("\n".join(problems))
    if not found:
        raise UserError(f"{key} is an empty list; name a file or a folder")
    return list(found.values())


def file_sha256(file: SourceFile) -> str:
    """Of the file's bytes as stored, compressed ones included."""
    digest = hashlib.sha256()
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        while block := stream.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hint(word: str, choices: Sequence[str]) -> str:
    """Return "; did you mean X?", or nothing when no choice is near."""
    near = nearest(word, choices)
    return did_you_mean([near] if near else [])


def _format(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        # Parquet compresses inside; a compressed one could not be read by row groups.
        return None if kind == "parquet" else kind
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _filesystem(uri: str | None) -> tuple[fs.FileSystem, str]:
    if uri is None:
        return fs.LocalFileSystem(), ""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {error}") from None
    return filesystem, path


def _expand(entry: str) -> list[SourceFile]:
    if entry == BUILTIN:
        raise UserError("builtin stands alone, not in a list with files")
    if "://" in entry:
        return _expand_remote(entry)
    path = os.path.abspath(os.path.expanduser(entry))
    if not os.path.exists(path) and _WILDCARD.search(entry):
        paths = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        infos = fs.LocalFileSystem().get_file_info(paths)
        return _readable(entry, infos, uri=None)
    if not os.path.exists(path):
        raise UserError(f"{entry}: there is no such file or folder{_nearby(path)}")
    return _from_file_or_folder(entry, fs.LocalFileSystem(), path, uri=None)


def _expand_remote(entry: str) -> list[SourceFile]:
    location, mark, query = entry.partition("?")
    wildcard = _WILDCARD.search(location)
    if wildcard is None:
        filesystem, path = _filesystem(entry)
        return _from_file_or_folder(entry, filesystem, path, uri=entry)
    folder = location[: location.rindex("/", 0, wildcard.start())]
    filesystem, base = _filesystem(folder + mark + query)
    pattern = re.compile(_glob_regex(location[len(folder) :]))
    selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = [info for info in _listing(entry, filesystem, selector) if info.is_file]
    matching = [info for info in infos if pattern.fullmatch(info.path[len(base) :])]
    return _readable(entry, matching, uri=folder + mark + query)


def _glob_regex(pattern: str) -> str:
    """Translate a glob: `**/` any folders, `*` within one name."""
    out = []
    for token in re.findall(r"\*\*/|\*|\[[^\]]*\]|.", pattern):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "*":
            out.append("[^/]*")
        else:
            out.append(token.replace("[!", "[^") if token[0] == "[" else re.escape(token))
    return "".join(out)


def _from_file_or_folder(
    entry: str, filesystem: fs.FileSystem, path: str, *, uri: str | None
) -> list[SourceFile]:
    info = _listing(entry, filesystem, path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{entry}: there is no such file or folder")
    if info.is_file:
        return _readable(entry, [info], uri=uri)
    infos = _listing(entry, filesystem, fs.FileSelector(path, recursive=True))
    visible = [i for i in infos if i.is_file and not _hidden(i.path[len(path) :])]
    readable = [i for i in visible if _format(i.path) is not None]
    if not readable:
        raise UserError(
            f"{entry}: the folder holds no file that can be read ({_extensions()}); "
            f"it holds {len(visible)} other files"
        )
    return _readable(entry, readable, uri=uri)


def _listing(entry: str, filesystem: fs.FileSystem, what: str | fs.FileSelector) -> fs.FileInfo:
    try:
        return filesystem.get_file_info(what)
    except OSError as error:
        raise UserError(f"{entry}: cannot be listed: {error}") from None


def _readable(entry: str, infos: Sequence[fs.FileInfo], *, uri: str | None) -> list[SourceFile]:
    if not infos:
        raise UserError(f"{entry}: no file matches")
    files = [SourceFile(i.path, i.size, i.mtime_ns or 0, uri) for i in infos]
    for file in files:
        if _format(file.path) is None:
            suffix = PurePosixPath(file.path).suffix
            near = hint(suffix, list(FORMATS)) if suffix not in COMPRESSIONS else ""
            raise UserError(
                f"{file.name}: cannot read {suffix or 'a name without extension'}"
                f"{near} ({_extensions()})"
            )
    return sorted(files, key=lambda file: file.path)


def _extensions() -> str:
    return f"readable: {' '.join(FORMATS)}, also {' '.join(COMPRESSIONS)} of all but .parquet"


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _nearby(path: str) -> str:
    """The nearest name in the same folder, or the part of the path that is missing."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        return f" ({folder} is not a folder)"
    return hint(name, os.listdir(folder))
