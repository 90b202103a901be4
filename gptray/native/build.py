"""Builds the native library for this machine once and keeps it in the user's cache folder.

A library's name is a hash of everything that its bytes depend on, including the processor, and ends
with their digest, which is verified before every use. A damaged library is built again; one that
another user could have written is never loaded. If others can write to the user's own cache folder,
as with a umask of 002, their access is removed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from gptray.config import RunFailed, UserError
from gptray.native.compiler import (
    compiler,
    compiler_version,
    options,
    run_compiler,
    uses_tiles,
)
from gptray.native.processor import ARCH_PRCTL, ASK_FOR, TILE_DATA, processor_flags, why_not_here
from gptray.storage.files import cache_folder, cannot_write, check_writable, remove, sha256_of

log = logging.getLogger("gptray")

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "decode.cpp", _FOLDER / "train.cpp")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# A program that exits with 0 if the given library works here.
_TRIAL = f"""
import ctypes, sys
ctypes.CDLL(None).syscall({ARCH_PRCTL}, {ASK_FOR}, {TILE_DATA})
sys.exit(ctypes.CDLL(sys.argv[1]).works_here() != 1)
"""
# The most disk space that a library needs.
_LIBRARY_BYTES = 4 << 20


def build_library(*, key: str) -> Path:
    """Return the native library's file; build it, in some seconds, if this machine has none yet.

    key: the config's key that can be set to torch to do without it, for messages.

    Raises:
        RunFailed: the processor or compiler does not support it; or the cache folder cannot be
            written, or others can write to it and that cannot be changed.
    """
    if why := why_not_here():
        raise RunFailed(f"{why}; set {key}=torch to do without it")
    remedy = f"set XDG_CACHE_HOME to another folder, or {key}=torch to do without it"
    name, folder = library_name(), cache_folder()
    _make_private(folder)
    found = cached_library(name)
    if found:
        return found
    for damaged in folder.glob(f"{name}-*.so"):
        log.warning("%s is damaged or belongs to another user; building it again", damaged)
        with suppress(OSError):
            remove(damaged)
    log.info("building the native library, once: %s", folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LIBRARY_BYTES:  # a compiler's message takes pages
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if problem := _not_private(folder):
            raise RunFailed(f"{folder} {problem}, so no code is loaded from it; {remedy}")
        draft = TemporaryDirectory(prefix=".build-", dir=folder, ignore_cleanup_errors=True)
        with draft as own:
            fresh = _compile(Path(own), key)
            path = folder / f"{name}-{_digest(fresh)}.so"
            os.replace(fresh, path)
    except OSError as error:
        raise RunFailed(f"{cannot_write(folder / name, error)}; {remedy}") from None
    if cached_library(name) is None:
        raise RunFailed(
            f"{path} was changed by another process while it was being written; {remedy}"
        )
    return path


def _compile(folder: Path, key: str) -> Path:
    """Build the library in a folder, with this processor's tiles if they work."""
    if uses_tiles():
        library = _compile_parts(folder, key, tiles=True)
        if _works(library):
            return library
        log.warning(
            "the native library is built without AMX: a trial of it crashed or gave wrong products"
        )
    return _compile_parts(folder, key, tiles=False)


def _works(library: Path) -> bool:
    """Whether a library passes its own check, in a process of its own because it may crash."""
    command = [sys.executable, "-c", _TRIAL, str(library)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compile_parts(folder: Path, key: str, *, tiles: bool) -> Path:
    """Build the library in a folder, compiling its sources in parallel."""
    remedy = f"set {key}=torch to do without it"

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        run_compiler("-c", "-o", made, source, tiles=tiles, remedy=remedy)
        return made

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(compile_one, _SOURCES))
    library = folder / "library.so"
    run_compiler("-o", library, *parts, tiles=tiles, remedy=remedy)
    if not _is_library(library):
        wrote = f"the compiler {shlex.join(compiler())} wrote no library"
        raise RunFailed(f"{wrote}; set CXX to another, or {key}=torch to do without it")
    library.chmod(0o644)
    return library


def library_name() -> str:
    """The name of this machine's libraries, without the digest of their bytes.

    A hash of what the bytes depend on: sources, headers, the compiler with its flags and version,
    and the processor, because flags such as -march=native depend on it.
    """
    parts = [*_SOURCES, *sorted(_FOLDER.glob("*.h"))]
    text = b"".join(part.read_bytes() for part in parts)
    command = (compiler(), compiler_version(), options(tiles=uses_tiles()))
    text += repr((*command, sorted(processor_flags()))).encode()
    return f"native-{hashlib.sha256(text).hexdigest()[:16]}"


def cached_library(name: str) -> Path | None:
    """A cached library, if its digest is right and nobody else can write to it."""
    folder = cache_folder()
    if not folder.is_dir() or _not_private(folder):
        return None
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError):
            if not _not_private(path) and path.stem.endswith(f"-{_digest(path)}"):
                return path
    return None


def _make_private(folder: Path) -> None:
    """Remove other users' permission to write to the user's own cache folder."""
    if _is_own(folder) and _not_private(folder):
        with suppress(OSError):  # the folder is then refused on use
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~_OTHERS_WRITE)
            log.info("other users could write to %s; their access has been removed", folder)


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's and not a link, which may lead to a shared folder."""
    return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.geteuid()


def _not_private(path: Path) -> str | None:
    """Why another user could have written to a file or folder; None if none could."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        status = path.stat() if path.is_dir() else status
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({status.st_uid})"
    return "can be written by other users" if status.st_mode & _OTHERS_WRITE else None


def _is_library(path: Path) -> bool:
    """Whether it is a shared library, judging by its first bytes."""
    return path.is_file() and path.read_bytes()[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")  # macOS's


def _digest(path: Path) -> str:
    return sha256_of(path)[:32]


def why_no_cache() -> str | None:
    """Why the cache folder neither holds nor can take the library; None if it does or can."""
    if cached_library(library_name()):
        return None
    folder = cache_folder()
    try:
        check_writable(folder, key="cache")
    except UserError as error:
        return f"{str(error).removeprefix('cache: ')} (see XDG_CACHE_HOME)"
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    if folder.is_dir() and not _is_own(folder) and (problem := _not_private(folder)):
        return f"{folder} {problem}, so no code is loaded from it (see XDG_CACHE_HOME)"
    free = shutil.disk_usage(there).free
    if free < _LIBRARY_BYTES:
        return f"no space left for it in {folder} ({free:,} bytes free; see XDG_CACHE_HOME)"
    return None
