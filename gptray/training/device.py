"""Sets up the device for training: checks, determinism, memory and compilation."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gptray.config import Config, UserError
from gptray.model.gpt import GPT, Block
from gptray.model.gpu_faults import check_gpu
from gptray.model.loss import linear_cross_entropy
from gptray.model.memory import keep_freed_memory, return_freed_memory
from gptray.model.precision import enable_fast_fp32
from gptray.native.compiler import cannot_compile, why_not_compile
from gptray.native.core_sharing import share_cores
from gptray.wording import count


def use_device(config: Config, device: torch.device) -> None:
    """Make this process compute on `device`, deterministically on a CPU or as the config asks.

    Raises UserError if the GPU does not work.
    """
    if device.type == "cuda":
        check_gpu()
        if device.index is not None:  # events and compiled kernels use the current device
            torch.cuda.set_device(device)
    else:
        share_cores()
    torch.use_deterministic_algorithms(device.type == "cpu" or config.train.deterministic)
    # By default, deterministic mode also fills every new tensor, which costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    enable_fast_fp32()
    if config.compute.strategy == "fsdp":
        return_freed_memory()
    else:
        keep_freed_memory()


@contextmanager
def without_determinism() -> Iterator[None]:
    """Allow any algorithm in the block: determinism refuses the sampler's `cumsum` on GPUs."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def device_name(device: torch.device) -> str:
    """A description of the worker's GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {count(torch.get_num_threads(), 'thread')}"


def compiles(config: Config, device: torch.device) -> bool:
    """Whether to compile the training step. Raises UserError if it should be but cannot be."""
    on_gpu = device.type != "cpu"
    wanted = config.train.compiles(on_gpu=on_gpu)
    missing = why_not_compile(on_gpu=on_gpu) if wanted else None
    if missing:
        raise UserError(cannot_compile(missing))
    return wanted


def compiled(
    model: GPT, device: torch.device, tell: Callable[[str], None], *, in_parts: bool
) -> nn.Module:
    """The model, to be compiled at its first step; on a GPU, `tell` says so.

    in_parts: compile each block and the head separately, so that gradients arrive block by block,
    at the cost of fusion across blocks.
    """
    if device.type != "cpu":
        tell(
            f"compiling the training step for {device_name(device)}: the first step takes up to "
            "a minute (train.compile=false starts at once but trains more slowly)"
        )
    if in_parts:
        for block in model.transformer.h:
            assert isinstance(block, Block)
            block.compiled = torch.compile(block.compute)
        model.head_loss = torch.compile(linear_cross_entropy)
        return model
    return torch.compile(model)  # type: ignore[return-value]
