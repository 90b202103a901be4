"""What Linux and macOS do differently."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

SYSCTL = Path("/usr/sbin/sysctl")


def on_mac() -> bool:
    """Whether this is macOS."""
    return platform.system() == "Darwin"


def sysctl(name: str) -> str:
    """The value that macOS has for a name; empty if it has none."""
    command = [str(SYSCTL), "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
