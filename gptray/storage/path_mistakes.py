"""Paths that the system refuses and the user can change, in words."""

from __future__ import annotations

import errno
import os


def path_mistake(error: OSError) -> str | None:
    """What is wrong with the path of an error; None if the path is not what is wrong."""
    named, why = str(error.filename), os.strerror(error.errno or 0)
    if error.errno == errno.ENAMETOOLONG:
        return f"{why}: {named[:60]}...; choose a shorter one"
    if isinstance(error, PermissionError) and error.filename:
        return f"{named}: {why}"
    if error.errno == errno.ENOENT and error.filename is None and error.strerror == why:
        return "the current folder no longer exists; change to another one"
    return None


def uri_slip(part: str) -> str | None:
    """What to write for a URI with a slash too few, if a part of a path seems to begin one."""
    if not part.endswith(":"):
        return None
    rest = "/folder" if part == "file:" else "bucket/folder"
    return f"{part}/ does not begin a URI; write {part}//{rest}"
