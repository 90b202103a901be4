"""What the processor must have for the native code, and what this machine's is and has."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Instructions as Linux names them, and the compiler's option for each.
INSTRUCTIONS = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}
# Matrix tiles (Intel's AMX), which are used where the processor has all of this.
TILES = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}
# Linux gives a process tiles when it asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
ARCH_PRCTL, ASK_FOR, TILE_DATA = 158, 0x1023, 18


def why_not_here() -> str | None:
    """Why this machine cannot run the native code, compiled or not; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the native code is for Linux on x86-64"
    lacks = sorted(INSTRUCTIONS.keys() - processor_flags())
    return f"this processor has no {', '.join(lacks)}" if lacks else None


def may_use_tiles() -> bool:
    """Whether the processor has tiles and Linux, which is asked here, gives this process them."""
    if not TILES.keys() <= processor_flags():
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR, TILE_DATA) == 0)


def processor_flags() -> set[str]:
    """The instruction sets and other features of this machine's processor."""
    return set(_facts().get("flags", "").split())


def processor_name() -> str:
    """What this machine's processor is called; its architecture, where that is not told."""
    return _facts().get("model name") or f"{platform.machine()} processor"


def processor_identity() -> list[str]:
    """What tells this machine's kind of processor from others, for whatever was measured on it."""
    facts = _facts()
    kind = [facts.get(key, "") for key in ("cpu family", "model", "cache size")]
    return [processor_name(), *kind, *sorted(processor_flags())]


def _facts() -> dict[str, str]:
    """What Linux tells of the first core, by name."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text("utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
