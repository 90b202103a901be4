"""Counts this machine's GPUs and says what PyTorch is built for, without importing torch."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

from gptray.system import on_mac

# Where drivers list GPUs: NVIDIA's on Linux, and AMD's, where a node without SIMDs is a CPU.
NVIDIA, AMD = Path("/proc/driver/nvidia/gpus"), Path("/sys/class/kfd/kfd/topology/nodes")
# Variables that hide GPUs from a process: NVIDIA's, which AMD's runtime also reads, and AMD's own.
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def local_gpus() -> int:
    """The number of GPUs that this process may use."""
    devices = len(list(NVIDIA.glob("*"))) or sum(map(_is_gpu, AMD.glob("*/properties")))
    # WSL2 and some containers lack the folder of NVIDIA's driver.
    devices = devices or sum(bool(re.match(r"GPU \d+:", line)) for line in nvidia_smi("-L"))
    for name in HIDING:
        if (visible := os.environ.get(name)) is not None:
            named = [one for one in visible.split(",") if one.strip() not in ("", "-1")]
            devices = min(devices, len(named))
    return devices


def _is_gpu(node: Path) -> bool:
    try:
        return bool(re.search(r"^simd_count [1-9]", node.read_text("utf-8"), re.MULTILINE))
    except OSError:  # a GPU that this container may not use
        return False


def nvidia_smi(*options: str) -> list[str]:
    """The output lines of nvidia-smi with these options; none if it does not answer."""
    command = ["nvidia-smi", *options]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.splitlines()


def built_for_cpus() -> str:
    """The message for compute.use_gpu where PyTorch is a CPU build, or has only Apple's GPUs."""
    if on_mac():
        return (
            "compute.use_gpu=true, but gptray does not use Apple's GPUs; leave it out to use the "
            "processor"
        )
    return (
        "compute.use_gpu=true, but the installed PyTorch is a CPU build; install one for GPUs: pip "
        "install --force-reinstall torch"
    )


def is_torch_for_cpus() -> bool:
    """Whether the installed PyTorch is a CPU build."""
    kinds = _torch_kinds()
    return bool(kinds) and not any(kinds.values())


def torch_cuda() -> str | None:
    """The CUDA version of the installed PyTorch, such as 13.0; None if it has none."""
    return _torch_kinds().get("cuda")


def _torch_kinds() -> dict[str, str | None]:
    """The CUDA and HIP versions of the installed PyTorch, from its version.py."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(spec.submodule_search_locations[0]) / "version.py"
    found = re.findall(r"^(cuda|hip)\b.*= *(.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {kind: None if said.strip() == "None" else said.strip(" '\"") for kind, said in found}
