"""The instruction sets that the native code needs, and those of this machine's processor."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

from gptray.system import on_mac, sysctl

CPUINFO = Path("/proc/cpuinfo")
# The flags that an x86 processor must have, by Linux's names, and the compiler's option for each.
INSTRUCTIONS = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
}
# The features that an ARM processor may have besides NEON, by Linux's and macOS's names, and the
# compiler's option for each feature and those before it.
ARM_LEVELS = {
    ("asimddp", "FEAT_DotProd"): "-march=armv8.2-a+dotprod",
    ("bf16", "FEAT_BF16"): "-march=armv8.2-a+dotprod+bf16",
    ("i8mm", "FEAT_I8MM"): "-march=armv8.2-a+dotprod+bf16+i8mm",
}
ARM_BASE = "-march=armv8-a"
# Matrix tiles (Intel AMX), used if the processor has all of these.
TILES = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}
# The entries of /proc/cpuinfo that tell kinds of processors apart, on x86 and on ARM.
_KIND = ("cpu family", "model", "cache size", "CPU implementer", "CPU part", "CPU variant")
# A process must ask Linux for tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
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
    """Whether the processor has tiles; asks Linux to let this process use them."""
    if not TILES.keys() <= processor_flags():
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR, TILE_DATA) == 0)


def processor_flags() -> set[str]:
    """The instruction sets and other features of this machine's processor."""
    facts = _facts()
    return set((facts.get("flags") or facts.get("Features", "")).split())


def processor_name() -> str:
    """The name of this machine's processor, or its architecture if the name is unknown."""
    return _facts().get("model name") or f"{platform.machine()} processor"


def processor_identity() -> list[str]:
    """What identifies this machine's kind of processor, for measurements made on it."""
    facts = _facts()
    kind = [facts.get(key, "") for key in _KIND]
    return [processor_name(), *kind, *sorted(processor_flags())]


def _facts() -> dict[str, str]:
    """The system's facts about the first core, by Linux's names."""
    if on_mac():
        return mac_facts()
    try:
        first = CPUINFO.read_text("utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@cache
def mac_facts() -> dict[str, str]:
    """macOS's facts about the processor, by Linux's names."""
    asked = [name for names in ARM_LEVELS for name in names if name.startswith("FEAT_")]
    name = sysctl("machdep.cpu.brand_string")
    features = [one for one in asked if sysctl(f"hw.optional.arm.{one}") == "1"]
    return {"model name": name, "Features": " ".join(features)}
