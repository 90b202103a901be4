"""Lists the files of folders and globs, without hidden ones; link loops are visited once.

Local names need not be UTF-8: Python keeps their bytes in surrogates, and `shown` escapes them.
URIs are listed by pyarrow's file systems.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyarrow import fs

from gptray.config import UserError
from gptray.storage.store_access import file_system, reason, with_retries

WILDCARD = re.compile(r"[*?\[]")


class LocalFile(NamedTuple):
    """A regular file, as it was found."""

    path: str
    size: int  # bytes
    modified: int  # ns


def shown(path: str) -> str:
    """A path for messages and manifests: bytes that are not UTF-8 become \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_at(path: str) -> LocalFile | None:
    """The regular file at a path; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return LocalFile(path, status.st_size, status.st_mtime_ns) if is_file else None


def files_below(folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder that are not hidden, following links.

    Enters a folder once, however many links lead to it. Raises OSError for an unreadable folder.
    """
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise error

    for above, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(above)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        links = {name for name in folders if os.path.islink(os.path.join(above, name))}
        seen = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(seen, key=lambda name: (name in links, name))  # links come last
        yield from (os.path.join(above, name) for name in sorted(names) if name[0] != ".")


def glob_regex(pattern: str) -> str:
    """Translate a glob to a regular expression: `**/` any folders, `*` within one name."""
    out = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|.", pattern, re.DOTALL):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "**":
            out.append(".*")
        elif token in ("*", "?"):
            out.append("[^/]" + token.replace("?", ""))
        else:
            out.append(
                token.replace("[!", "[^") if token[0] == "[" and token != "[" else re.escape(token)
            )
    return f"(?s:{''.join(out)})"  # a name may hold a line break


def glob_files(pattern: str) -> list[str]:
    """Paths of the files that a glob matches, in any Unicode form of their names.

    `**/` matches any folders, each loop visited once.
    """
    first = re.search(WILDCARD, pattern)
    assert first
    end = pattern.rindex("/", 0, first.start())
    folder, rest = as_spelled(pattern[:end]), pattern[end:]
    forms = [rest, *(unicodedata.normalize(form, rest) for form in ("NFC", "NFD"))]
    patterns = list(dict.fromkeys(folder + form for form in forms))
    if "**" in pattern:
        wanted = re.compile("|".join(map(glob_regex, patterns)))
        found = [path for path in files_below(folder or "/") if wanted.fullmatch(path)]
    else:
        found = [path for one in patterns for path in glob.glob(one)]
    return [path for path in found if os.path.isfile(path)]


def as_spelled(path: str) -> str:
    """The path or, if there is nothing there, the one that exists in another Unicode form.

    Keyboards compose a letter and its accents, or a Korean syllable; Macs store them decomposed,
    also in archives, and look the same.
    """
    folder, name = os.path.split(path)
    if os.path.lexists(path) or not name:
        return path
    folder, composed = as_spelled(folder), unicodedata.normalize("NFC", name)
    alike = [one for one in names_in(folder) if unicodedata.normalize("NFC", one) == composed]
    return os.path.join(folder, alike[0] if len(alike) == 1 else name)


def names_in(folder: str) -> list[str]:
    """The names in a folder; none if it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def unique_files(paths: Iterable[str]) -> Iterator[str]:
    """Yield the first path to each file, whatever hard or symbolic links lead to it."""
    met: set[str] = set()
    for path in paths:
        place = file_identity(path)
        if place not in met:
            met.add(place)
            yield path


def file_identity(path: str) -> str:
    """The file's device and inode: the same for all names of one file."""
    status = os.stat(path)
    return f"{status.st_dev} {status.st_ino}"


def remote_files(entry: str) -> tuple[list[fs.FileInfo], str, bool]:
    """The files that a URI names, the URI that opens them, and whether it names a folder.

    Raises UserError if they cannot be listed or do not exist.
    """
    location, mark, query = entry.partition("?")
    wildcard = WILDCARD.search(location)
    if wildcard is None:
        filesystem, path = file_system(entry)
        return _file_or_folder(entry, filesystem, path)
    folder = location[: location.rindex("/", 0, wildcard.start())]
    filesystem, base = file_system(folder + mark + query)
    rest = location[len(folder) :]
    pattern = re.compile(glob_regex(rest))
    selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = [info for info in _listing(entry, filesystem, selector) if info.is_file]
    matching = [info for info in infos if pattern.fullmatch(info.path[len(base) :])]
    if not _hidden(rest):
        matching = [info for info in matching if not _hidden(info.path[len(base) :])]
    return matching, folder + mark + query, False


def _file_or_folder(
    entry: str, filesystem: fs.FileSystem, path: str
) -> tuple[list[fs.FileInfo], str, bool]:
    info = _listing(entry, filesystem, path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{entry}: there is no such file or folder")
    if info.is_file:
        return [info], entry, False
    infos = _listing(entry, filesystem, fs.FileSelector(path, recursive=True))
    return [i for i in infos if i.is_file and not _hidden(i.path[len(path) :])], entry, True


def _listing(entry: str, filesystem: fs.FileSystem, what: str | fs.FileSelector) -> fs.FileInfo:
    try:
        return with_retries(lambda: filesystem.get_file_info(what))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{entry}: cannot be listed: {reason(error)}") from None


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
