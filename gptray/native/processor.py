"""What the processor must have for the native code, and what this machine's is and has."""

from __future__ import annotations

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


def why_not_here() -> str | None:
    """Why this machine cannot run the native code, compiled or not; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the native code is for Linux on x86-64"
    lacks = sorted(INSTRUCTIONS.keys() - processor_flags())
    return f"this processor has no {', '.join(lacks)}" if lacks else None


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
