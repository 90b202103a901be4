"""Describes the machine that a figure is from."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from gptray.native.compiler import uses_tiles
from gptray.native.processor import processor_name

ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, str]:
    """The GPU, its driver, the processor and versions; "" for what is unknown."""
    on_gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0))
    return {
        "GPU": torch.cuda.get_device_name(device) if on_gpu else "",
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else "",
        "processor": f"{processor_name()} x {cores}",
        "AMX": "in the native kernels" if uses_tiles() else "",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "gptray": _answer("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _answer(*command: str) -> str:
    """The first line that a command prints; "" if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()
