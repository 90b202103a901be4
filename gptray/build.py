"""Builds the project's own C++ for this machine, once: libraries stay in the user's cache folder.

Loads no torch, so that a job can ask what there is before it starts anything.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.files import cannot_write, check_writable, replacing

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
        raise UserError(f"{key}=native: {missing}; {key}=auto does without")
    if missing:
        log.info("%s: PyTorch, since %s", key, missing)
    return "torch" if missing else "native"


def built(source: Path, *, key: str) -> Path:
    """The library of a C++ source and the headers beside it.

    Takes some seconds the first time on a machine.

    key: what to set to torch to do without it.

    Raises:
        RunFailed: the compiler does not take the source; with what it says.
    """
    command = [*_compiler(), *_OPTIONS]
    path = _library_path(source)
    if path.is_file():
        return path
    log.info("building %s, once: %s", source.name, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < _LIBRARY_BYTES:  # the compiler says it in pages
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replacing(path) as fresh:
            _run([*command, "-o", str(fresh), str(source)], f"{key}=torch does without it")
    except OSError as error:
        raise RunFailed(
            f"{cannot_write(path, error)}; XDG_CACHE_HOME names another folder, and {key}=torch "
            "does without it"
        ) from None
    return path


def _library_path(source: Path) -> Path:
    """Where the library of a source is kept: source, compiler and options are in its name."""
    parts = [source, *sorted(source.parent.glob("*.h"))]
    text = b"".join(part.read_bytes() for part in parts)
    text += repr((shutil.which(_compiler()[0]), _OPTIONS)).encode()
    return _cache_folder() / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"


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
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]} on this machine"
    asked = [*compiler, *_OPTIONS, "-E", "-x", "c++", os.devnull]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        return f"the compiler {shlex.join(compiler)} does not know {' '.join(_OPTIONS)}"
    if source and not _library_path(source).is_file():
        return _why_not_kept(_cache_folder())
    return None


def _why_not_kept(folder: Path) -> str | None:
    """Why a folder does not take a library; None if it does."""
    try:
        check_writable(folder, key="XDG_CACHE_HOME")
    except UserError as error:
        return str(error)
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    if free < _LIBRARY_BYTES:
        return f"there is no room for it in {folder} ({free:,} bytes free; see XDG_CACHE_HOME)"
    return None


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptray"
