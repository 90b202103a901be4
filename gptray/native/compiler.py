"""The machine's C++ compiler, for the native library and for torch.compile."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.native.processor import TILES, instruction_options, may_use_tiles
from gptray.system import on_mac

log = logging.getLogger("gptray")

_OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC")
# Uses the OpenMP runtime that PyTorch has loaded, so that both share its threads. macOS has another
# flag, and resolves the runtime's symbols when the library is loaded.
_OPENMP = ("-fopenmp",)
_MAC_OPENMP = ("-Xpreprocessor", "-fopenmp", "-Wl,-undefined,dynamic_lookup")


def compiler() -> list[str]:
    """The C++ compiler's command and flags: CXX, or g++. Raises UserError for an open quote."""
    given = os.environ.get("CXX") or "g++"
    try:
        return shlex.split(given) or ["g++"]
    except ValueError as error:
        raise UserError(f"CXX={given}: {error}") from None


def options(*, tiles: bool) -> tuple[str, ...]:
    """The compiler's options for the native library. tiles: whether it uses AMX tiles."""
    openmp = _MAC_OPENMP if on_mac() else _OPENMP
    return (*_OPTIONS, *openmp, *instruction_options(), *(TILES.values() if tiles else ()))


def uses_tiles() -> bool:
    """Whether the native library can use tiles: processor, Linux and compiler support them."""
    return may_use_tiles() and _accepts_tiles(tuple(compiler()))


@cache
def _accepts_tiles(command: tuple[str, ...]) -> bool:
    if _accepts(command, options(tiles=True)):
        return True
    log.warning(
        "the native library is built without AMX: the compiler %s does not support %s",
        shlex.join(command),
        " ".join(TILES.values()),
    )
    return False


def _accepts(command: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether a compiler accepts these options."""
    line = [*command, *asked, "-E", "-x", "c++", os.devnull]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def compiler_version() -> str:
    """The compiler's output for --version; empty if there is no compiler."""
    return _version_of(tuple(compiler()))


def why_no_library() -> str | None:
    """Why the native library cannot be compiled on this machine; None if it can."""
    command = compiler()
    if missing := _why_no_compiler():
        return missing
    asked = options(tiles=False)
    if not _accepts(command, asked):
        return f"the compiler {shlex.join(command)} does not support {' '.join(asked)}"
    return None


def _why_no_compiler() -> str | None:
    """Says that there is no compiler, else None; macOS has stubs that only ask to install one."""
    command = compiler()[0]
    if shutil.which(command) and (not on_mac() or compiler_version()):
        return None
    hint = "xcode-select --install" if on_mac() else "apt-get install g++"
    return f"there is no C++ compiler {command} on this machine ({hint})"


def run_compiler(*arguments: str | Path, tiles: bool, remedy: str) -> None:
    """Compile or link; the message names the last argument.

    Raises:
        RunFailed: the compiler failed; with the first lines of its output.
    """
    command = [*compiler(), *options(tiles=tiles), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n".join(done.stderr.splitlines()[:5])
        raise RunFailed(
            f"{command[-1]} cannot be built ({shlex.join(command)}):\n{words}\n{remedy}"
        )


def why_not_compile(*, on_gpu: bool) -> str | None:
    """Why torch.compile does not work on this machine, and what to install; None if it does.

    On a GPU, Triton has the C compiler build a small module for this Python.
    """
    if not on_gpu:
        missing = _why_no_compiler()
        return missing and f"{missing}; install it, or name another one in CXX"
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
    """The message if the training step cannot be compiled."""
    return (
        f"train.compile: the training step cannot be compiled: {reason}. Set train.compile=false "
        "to train without"
    )


@cache
def _version_of(command: tuple[str, ...]) -> str:
    asked = [*command, "--version"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
