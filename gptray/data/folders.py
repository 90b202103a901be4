"""Local folders and globs as lists of files, without hidden ones; link loops are visited once.

Names need not be UTF-8: Python keeps their bytes in surrogates, and `shown` escapes them.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

WILDCARD = re.compile(r"[*?\[]")


class LocalFile(NamedTuple):
    """A regular file, as it was found."""

    path: str
    size: int  # bytes
    modified: int  # ns


def shown(path: str) -> str:
    """A path for people and manifests: bytes that are not UTF-8 as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_at(path: str) -> LocalFile | None:
    """The file at a path; None if there is none, or it is not a regular one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return LocalFile(path, status.st_size, status.st_mtime_ns) if is_file else None


def files_below(folder: str) -> Iterator[str]:
    """Paths of what is not hidden and not a folder below a folder, links followed.

    A folder that several links lead to is entered once. Raises OSError for one that cannot be read.
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
    """Translate a glob: `**/` any folders, `*` within one name."""
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
    return "".join(out)


def matches(pattern: str) -> list[str]:
    """Paths of the files that a glob matches; `**/` matches any folders, each loop visited once."""
    if "**" in pattern:
        first = re.search(WILDCARD, pattern)
        assert first
        folder = pattern[: pattern.rindex("/", 0, first.start())] or "/"
        wanted = re.compile(glob_regex(pattern))
        found = [path for path in files_below(folder) if wanted.fullmatch(path)]
    else:
        found = glob.glob(pattern)
    return [path for path in found if os.path.isfile(path)]


def once(paths: Iterable[str]) -> Iterator[str]:
    """The first path to each file: links of both kinds lead to the same one."""
    met: set[str] = set()
    for path in paths:
        place = identity(path)
        if place not in met:
            met.add(place)
            yield path


def identity(path: str) -> str:
    """Equal for two names of one file."""
    status = os.stat(path)
    return f"{status.st_dev} {status.st_ino}"
