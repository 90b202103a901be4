"""What training needs from its device: that it works, repeats bit for bit, and what is compiled."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptray.config import Config, UserError
from gptray.model.gpt import GPT, Block
from gptray.model.gpu_faults import check_gpu
from gptray.model.loss import linear_cross_entropy
from gptray.model.memory import keep_freed_memory, return_freed_memory
from gptray.model.precision import enable_fast_fp32
from gptray.native.compiler import cannot_compile, why_not_compile
from gptray.native.core_sharing import share_cores


def use_device(config: Config, device: torch.device) -> None:
    """Make this process compute on a device: on a CPU always the same bits for the same shape, on
    a GPU where the config says so.

    Raises UserError where there is no GPU that works.
    """
    if device.type == "cuda":
        check_gpu()
        if device.index is not None:  # of several, that of events and compiled kernels
            torch.cuda.set_device(device)
    else:
        share_cores()
    torch.use_deterministic_algorithms(device.type == "cpu" or config.train.deterministic)
    # That would also fill every new tensor, which helps to find bugs and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    enable_fast_fp32()
    if config.compute.strategy == "fsdp":
        return_freed_memory()
    else:
        keep_freed_memory()


def device_name(device: torch.device) -> str:
    """What a worker computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} processor, {threads} thread" + ("s" if threads > 1 else "")


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the training step is compiled. Raises UserError where it cannot be."""
    on_gpu = device.type != "cpu"
    wanted = config.train.compiles(on_gpu=on_gpu)
    missing = why_not_compile(on_gpu=on_gpu) if wanted else None
    if missing:
        raise UserError(cannot_compile(missing))
    return wanted


def compiled(
    model: GPT, device: torch.device, tell: Callable[[str], None], *, in_parts: bool
) -> nn.Module:
    """The model, which its first step compiles; on a GPU, say so by `tell`.

    in_parts: each block by itself, and the head, so that gradients come block by block; without
    what is gained between blocks.
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


def guard_updates(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor | None:
    """On a GPU a flag that, once it is 1, keeps the optimizer from updating anything; else None.

    It is what GradScaler would set: fused AdamW then leaves weights and moments as they are.
    """
    if device.type != "cuda":
        return None
    found_inf = torch.zeros((), device=device)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    return found_inf
