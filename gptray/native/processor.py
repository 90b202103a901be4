"""What the processor must have for the native code, and what this machine's is and has."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from functools import cache
from pathlib import Path

CPUINFO, SYSCTL = Path("/proc/cpuinfo"), Path("/usr/sbin/sysctl")
# What an x86 processor must have, as Linux names it, and the compiler's option for each.
INSTRUCTIONS = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}
# What an ARM processor may have besides NEON, as Linux and as macOS name it, and the compiler's
# option for all up to it.
ARM_LEVELS = {
    ("asimddp", "FEAT_DotProd"): "-march=armv8.2-a+dotprod",
    ("bf16", "FEAT_BF16"): "-march=armv8.2-a+dotprod+bf16",
}
ARM_BASE = "-march=armv8-a"
# Matrix tiles (Intel's AMX), which are used where the processor has all of this.
TILES = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}
# What tells one kind of processor from another: of x86, and of ARM.
_KIND = ("cpu family", "model", "cache size", "CPU implementer", "CPU part", "CPU variant")
# Linux gives a process tiles when it asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
ARCH_PRCTL, ASK_FOR, TILE_DATA = 158, 0x1023, 18


def why_not_here() -> str | None:
    """Why this machine cannot run the native code, compiled or not; None if it can."""
    if on_arm():
        return None
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the native code runs on Linux (x86-64 or ARM) and on macOS (ARM)"
    lacks = sorted(INSTRUCTIONS.keys() - processor_flags())
    return f"this processor has no {', '.join(lacks)}" if lacks else None


def on_arm() -> bool:
    """Whether this is Linux or macOS on a 64-bit ARM processor, all of which have NEON."""
    known = (("Linux", "aarch64"), ("Darwin", "arm64"))
    return (platform.system(), platform.machine()) in known


def instruction_options() -> tuple[str, ...]:
    """The compiler's options for the instructions that the native code uses on this processor."""
    if not on_arm():
        return tuple(INSTRUCTIONS.values())
    flags, best = processor_flags(), ARM_BASE
    for names, option in ARM_LEVELS.items():
        if not flags.intersection(names):
            break
        best = option
    return (best,)


def may_use_tiles() -> bool:
    """Whether the processor has tiles and Linux, which is asked here, gives this process them."""
    if not TILES.keys() <= processor_flags():
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR, TILE_DATA) == 0)


def processor_flags() -> set[str]:
    """The instruction sets and other features of this machine's processor."""
    facts = _facts()
    return set((facts.get("flags") or facts.get("Features", "")).split())


def processor_name() -> str:
    """What this machine's processor is called; its architecture, where that is not told."""
    return _facts().get("model name") or f"{platform.machine()} processor"


def processor_identity() -> list[str]:
    """What tells this machine's kind of processor from others, for whatever was measured on it."""
    facts = _facts()
    kind = [facts.get(key, "") for key in _KIND]
    return [processor_name(), *kind, *sorted(processor_flags())]


def _facts() -> dict[str, str]:
    """What the system tells of the first core, by the names that Linux has for it."""
    if platform.system() == "Darwin":
        return mac_facts()
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text("utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@cache
def mac_facts() -> dict[str, str]:
    """What macOS tells of the processor, by the names that Linux has for it."""
    asked = [name for names in ARM_LEVELS for name in names if name.startswith("FEAT_")]
    name = _sysctl("machdep.cpu.brand_string")
    features = [one for one in asked if _sysctl(f"hw.optional.arm.{one}") == "1"]
    return {"model name": name, "Features": " ".join(features)}


def _sysctl(name: str) -> str:
    """What macOS says of a name; empty where it does not know it."""
    command = [str(SYSCTL), "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
