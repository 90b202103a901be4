"""Builds the project's own C++ for this machine, once: libraries stay in the user's cache folder.

Loads no torch, so that a job can ask what there is before it starts anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.files import replacing

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
# OpenMP's runtime is the one that PyTorch has loaded: both share one set of threads.
_OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *_NEEDED.values())


def check_backend(key: str, backend: str, *, use_gpu: bool) -> str:
    """The backend for a key that says auto | native | torch: native where it can be had.

    Raises:
        UserError: native was asked for and cannot be had; says what is missing.
    """
    if backend == "torch" or (backend == "auto" and use_gpu):
        return "torch"
    missing = "it runs on CPUs, and compute.use_gpu=true" if use_gpu else _obstacle()
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
    compiler = _compiler()
    command = [*compiler, *_OPTIONS]
    parts = [source, *sorted(source.parent.glob("*.h"))]
    text = b"".join(part.read_bytes() for part in parts)
    text += repr((shutil.which(compiler[0]), _OPTIONS)).encode()
    path = _cache_folder() / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    log.info("building %s, once: %s", source.name, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            _run([*command, "-o", str(fresh), str(source)], f"{key}=torch does without it")
    except OSError as error:
        raise RunFailed(
            f"what was built of {source.name} cannot be kept: {error}; XDG_CACHE_HOME names "
            f"another folder, and {key}=torch does without it"
        ) from None
    return path


def _run(command: list[str], remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n".join(done.stderr.splitlines()[:5])
        raise RunFailed(
            f"{command[-1]} cannot be built ({shlex.join(command)}):\n{words}\n{remedy}"
        )


def _obstacle() -> str | None:
    """Why native code cannot be had on this machine; None if it can."""
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
    return None


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptray"
