"""Messages for GPU faults: no driver, a PyTorch not built for it, failed kernels, full memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gptray.config import RunFailed, UserError
from gptray.gpus import built_for_cpus


def check_gpu() -> None:
    """Raise UserError if this PyTorch cannot use a GPU here.

    The message has the reason (a build for CPUs or for other GPUs, no driver or an old one) and
    what to do.
    """
    version = torch.__version__
    if torch.version.cuda is None and torch.version.hip is None:
        raise UserError(built_for_cpus())
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        # Its first sentence says whether the driver is missing or too old.
        reason = str(error).strip().partition(". ")[0].rstrip(".")
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        raise UserError(
            f"compute.use_gpu=true, but PyTorch {version} ({kind}) cannot use a GPU here: "
            f"{reason}. Update the driver, or install a PyTorch build that matches it (see "
            "pytorch.org/get-started)"
        ) from None
    built_for, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability()
    if torch.version.cuda and built_for and not runs_on(capability, built_for):
        raise UserError(
            f"compute.use_gpu=true, but PyTorch {version} is built for {', '.join(built_for)}, and "
            f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}. Install a "
            "PyTorch that is built for it (see pytorch.org/get-started)"
        )


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether code built for these architectures runs on a GPU of this compute capability.

    sm_86 runs on GPUs from 8.6 to below 9.0; drivers compile compute_90 for any GPU from 9.0.
    """
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built_for)):
        code = int(major), int(minor)
        if code <= capability and (kind == "compute" or code[0] == capability[0]):
            return True
    return False


def out_of_gpu_memory(error: torch.OutOfMemoryError, *, key: str, size: int) -> RunFailed:
    """The error for a GPU whose memory is too small for `size` sequences at a time."""
    # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ... ..."
    said = str(error).strip().split(". ")
    facts = ". ".join(said[1:3]).rstrip(".")
    if size > 1:
        # A proper divisor, so that a batch divisible by `size` stays divisible.
        smaller = max(number for number in range(1, size) if size % number == 0)
        remedy = f"lower {key} from {size}, such as {key}={smaller}"
    else:
        remedy = (
            f"{key} is already 1, so the model, train.block_size or model.n_positions is too large"
        )
    return RunFailed(f"the GPU is out of memory ({facts}); {remedy}")


def why_failed(error: Exception) -> str:
    """One line for a failure of kernels or graphs.

    Triton's exceptions have no base class outside Triton, and show code before the reason.
    """
    if isinstance(error, subprocess.CalledProcessError):
        return "Triton needs a C compiler and Python's headers to start kernels"
    lines = str(error).strip().splitlines() or [""]
    told = lines[-1 if lines[0].endswith(":") else 0].strip()
    name = "" if type(error) is RuntimeError else type(error).__name__
    return ": ".join(filter(None, [name, told]))


@contextmanager
def memory_told(key: str, size: int) -> Iterator[None]:
    """Turn out-of-memory errors into RunFailed that says to lower `key` from `size`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_gpu_memory(error, key=key, size=size) from None
