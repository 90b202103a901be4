"""Files that a URI names, through pyarrow's file systems: one, a folder's, or those of a glob."""

from __future__ import annotations

import re

from pyarrow import fs

from gptray.config import UserError
from gptray.data.folders import WILDCARD, glob_regex
from gptray.store_access import file_system, persistently, reason


def remote_files(entry: str) -> tuple[list[fs.FileInfo], str, bool]:
    """The files that a URI names, the URI that opens them, and whether it is a folder's.

    Raises UserError for what cannot be listed or is not there.
    """
    location, mark, query = entry.partition("?")
    wildcard = WILDCARD.search(location)
    if wildcard is None:
        filesystem, path = file_system(entry)
        return _file_or_folder(entry, filesystem, path)
    folder = location[: location.rindex("/", 0, wildcard.start())]
    filesystem, base = file_system(folder + mark + query)
    pattern = re.compile(glob_regex(location[len(folder) :]))
    selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = [info for info in _listing(entry, filesystem, selector) if info.is_file]
    matching = [info for info in infos if pattern.fullmatch(info.path[len(base) :])]
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
        return persistently(lambda: filesystem.get_file_info(what))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{entry}: cannot be listed: {reason(error)}") from None


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
