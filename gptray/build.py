"""Builds the project's own C++ for this machine, once: libraries stay in the user's cache folder.

A library's name ends with the digest of its bytes, which is verified before every use. A damaged
library is built again; one that another user could have written is never loaded. A cache folder of
the user's own that others can write to, as a umask of 002 makes it, is closed to them. Loads no
torch, so that a job can check for a backend before it starts anything.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.files import cannot_write, check_writable, expanded, remove, sha256_of

log = logging.getLogger("gptray")

# What the processor must have, as Linux calls it, and the compiler's option for it.
_NEEDED = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Room that a library needs at most.
_LIBRARY_BYTES = 4 << 20
# OpenMP's runtime is the one that PyTorch has loaded: both share one set of threads.
_OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *_NEEDED.values())


def check_backend(key: str, backend: str, *, use_gpu: bool, source: Path | None = None) -> str:
    """The backend for a key that says auto | native | torch: native where this machine has it.

    source: what is to be built, if the folder that keeps it is to be looked at too.

    Raises:
        UserError: native was asked for and is not there; says what is missing.
    """
    if backend == "torch" or (backend == "auto" and use_gpu):
        return "torch"
    missing = "it runs on CPUs, and compute.use_gpu=true" if use_gpu else _obstacle(source)
    if missing and backend == "native":
        raise UserError(
            f"{key}=native: {missing}; {key}=auto falls back to PyTorch on the machine where the "
            f"job starts, {key}=torch uses it on every node"
        )
    if missing:
        log.info("%s: PyTorch, since %s", key, missing)
    return "torch" if missing else "native"


def built(source: Path, *, key: str) -> Path:
    """The library of a C++ source and the headers beside it.

    Takes some seconds the first time on a machine.

    key: what to set to torch to do without it.

    Raises:
        RunFailed: the compiler rejects the source, with its message; or the cache folder cannot be
            written, or others can write to it and that cannot be changed.
    """
    remedy = f"set XDG_CACHE_HOME to another folder, or {key}=torch to do without it"
    name, folder = _library_name(source), _cache_folder()
    _close(folder)
    found = kept(name)
    if found:
        return found
    for damaged in folder.glob(f"{name}-*.so"):
        log.warning("%s is damaged or not this user's: building it again", damaged)
        with suppress(OSError):
            remove(damaged)
    log.info("building %s, once: %s", source.name, folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LIBRARY_BYTES:  # the compiler says it in pages
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if problem := _not_private(folder):
            raise RunFailed(f"{folder} {problem}, so no code is loaded from it; {remedy}")
        with _draft(folder) as fresh:
            command = [*compiler(), *_OPTIONS, "-o", str(fresh), str(source)]
            _run(command, f"{key}=torch does without it")
            if not _is_library(fresh):
                wrote = f"the compiler {shlex.join(compiler())} wrote no library"
                raise RunFailed(f"{wrote}; set CXX to another, or {key}=torch to do without it")
            fresh.chmod(0o644)
            path = folder / f"{name}-{_digest(fresh)}.so"
            os.replace(fresh, path)
    except OSError as error:
        raise RunFailed(f"{cannot_write(folder / name, error)}; {remedy}") from None
    if kept(name) is None:
        raise RunFailed(f"{path} was changed by somebody else as it was written; {remedy}")
    return path


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A file to write a library to, in a temporary folder."""
    own = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    try:
        yield own / "library.so"
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _library_name(source: Path) -> str:
    """The name of a source's libraries, up to the digest of their own bytes.

    Derived from what the bytes depend on: source, headers, compiler with its flags and version.
    """
    parts = [source, *sorted(source.parent.glob("*.h"))]
    text = b"".join(part.read_bytes() for part in parts)
    text += repr((compiler(), _version(), _OPTIONS)).encode()
    return f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}"


def kept(name: str) -> Path | None:
    """A library that was built before, if its digest is right and nobody else can write to it."""
    folder = _cache_folder()
    if not folder.is_dir() or _not_private(folder):
        return None
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError):
            if not _not_private(path) and path.stem.endswith(f"-{_digest(path)}"):
                return path
    return None


def _close(folder: Path) -> None:
    """Take the permission to write to an own cache folder from other users, if they have it."""
    if _is_own(folder) and _not_private(folder):
        with suppress(OSError):  # the folder is refused where it is used
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~_OTHERS_WRITE)
            log.info("%s could be written by other users: it no longer can", folder)


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's and no link: one may lead to a folder that others share."""
    return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.geteuid()


def _not_private(path: Path) -> str | None:
    """Why another user may have written to a file or folder; None if none can."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        status = path.stat() if path.is_dir() else status
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({status.st_uid})"
    return "can be written by other users" if status.st_mode & _OTHERS_WRITE else None


def _is_library(path: Path) -> bool:
    """Whether a compiler has made a shared library there."""
    return path.is_file() and path.read_bytes()[:4] == b"\x7fELF"


def _digest(path: Path) -> str:
    return sha256_of(path)[:32]


@cache
def _version_of(command: tuple[str, ...]) -> str:
    asked = [*command, "--version"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _version() -> str:
    return _version_of(tuple(compiler()))


def _run(command: list[str], remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n".join(done.stderr.splitlines()[:5])
        raise RunFailed(
            f"{command[-1]} cannot be built ({shlex.join(command)}):\n{words}\n{remedy}"
        )


def _obstacle(source: Path | None) -> str | None:
    """Why native code does not run on this machine; None if it does."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the native code is for Linux on x86-64"
    lacks = sorted(set(_NEEDED) - _processor_flags())
    if lacks:
        return f"this processor has no {', '.join(lacks)}"
    command = compiler()
    if shutil.which(command[0]) is None:
        return f"there is no C++ compiler {command[0]} on this machine"
    asked = [*command, *_OPTIONS, "-E", "-x", "c++", os.devnull]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        return f"the compiler {shlex.join(command)} does not know {' '.join(_OPTIONS)}"
    if source and kept(_library_name(source)) is None:
        return _why_not_kept(_cache_folder())
    return None


def _why_not_kept(folder: Path) -> str | None:
    """Why a folder does not take a library; None if it does."""
    try:
        check_writable(folder, key="XDG_CACHE_HOME")
    except UserError as error:
        return str(error)
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    if folder.is_dir() and not _is_own(folder) and (problem := _not_private(folder)):
        return f"{folder} {problem}, so no code is loaded from it (see XDG_CACHE_HOME)"
    free = shutil.disk_usage(there).free
    if free < _LIBRARY_BYTES:
        return f"there is no room for it in {folder} ({free:,} bytes free; see XDG_CACHE_HOME)"
    return None


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def compiler() -> list[str]:
    """The C++ compiler's command and flags: CXX, or g++. Raises UserError for an open quote."""
    given = os.environ.get("CXX") or "g++"
    try:
        return shlex.split(given) or ["g++"]
    except ValueError as error:
        raise UserError(f"CXX={given}: {error}") from None


def why_not_compile(*, on_gpu: bool) -> str | None:
    """Why torch.compile does not work on this machine, and what to install; None if it does.

    On a GPU Triton has the C compiler build a small module for this Python.
    """
    if not on_gpu:
        command = compiler()[0]
        if shutil.which(command):
            return None
        return (
            f"it needs a C++ compiler, and there is no {command} on this machine; install it, or "
            "name another one in CXX"
        )
    commands = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if not any(map(shutil.which, commands)):
        return (
            f"it needs a C compiler, and there is no {' or '.join(commands)} on this machine; "
            "install one (apt-get install gcc), or name another one in CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return f"it needs {header}, which is missing; install it (apt-get install {python}-dev)"
    return None


def cannot_compile(reason: str) -> str:
    """What to say where the training step was to be compiled and cannot be."""
    return (
        f"train.compile: the training step cannot be compiled: {reason}. train.compile=false "
        "trains without that"
    )


def _cache_folder() -> Path:
    given = expanded(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard has a relative one ignored: each working directory would have a cache of its own.
    return (given if given.is_absolute() else expanded("~/.cache")) / "gptray"
