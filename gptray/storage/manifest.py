"""The manifest of a folder: every file's size and sha256, to detect damage."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from gptray.storage.files import is_storage, sha256_of
from gptray.storage.stored import Unreadable, read_object

FORMAT, MANIFEST = 1, "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write a folder's manifest, and flush the whole folder to disk. Raises OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), "utf-8")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def files_damage(folder: Path, *, needed: Sequence[str], others: bool = True) -> str | None:
    """What is wrong with the files of a folder; None if all are intact.

    needed: files that its manifest must list. others: whether all listed files must exist.
    """
    try:
        manifest = read_object(folder / MANIFEST)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except Unreadable as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        given = manifest.get("format")
        return f"{MANIFEST} has format {given!r:.40}, but this version reads {FORMAT}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return f"{MANIFEST} cannot be read (no list of files)"
    rest = [name for name in files if name not in needed] if others else []
    for name in (*needed, *rest):
        if problem := _file_damage(folder, name, files.get(name)):
            return problem
    return None


def _file_damage(folder: Path, name: str, expected: object) -> str | None:
    """What is wrong with a file that a manifest lists; None if it is intact."""
    shown = f"{name:.60}"
    match expected:
        case {"size": int(size), "sha256": str(sha256)} if ".." not in Path(name).parts:
            path = folder / name
        case _:
            return f"{MANIFEST} cannot be read (its entry of {shown})"
    try:
        if not path.is_file():
            return f"{shown} is missing"
        if path.stat().st_size != size:
            return f"{shown} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != sha256:
            return f"{shown} does not have the sha256 in its manifest"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and is_storage(error):
            raise
        return f"{shown} cannot be read ({error})"
    return None


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
