"""The weights of a frozen base, shared by all processes on a machine that train adapters of it.

A file in the node's cache holds them in the form that training uses, rounded or quantized. All
processes map it and so share its pages. The mapping is private, so no write could reach the file;
none is made, because weights to train are copied out of it.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.model.adapter import Base
from gptray.model.gpt import GPT
from gptray.model.hf import load_weights
from gptray.model.importance import base_importance
from gptray.model.quantized import ROUNDING
from gptray.model.quantized_linear import quantized_layers
from gptray.model.usage import Usage
from gptray.storage.files import CannotWrite, cache_folder, storing
from gptray.storage.node_cache import made_once, make_room
from gptray.storage.record import versions
from gptray.wording import size_words

log = logging.getLogger("gptray")

_FILE = "frozen.bin"
# Alignment of tensors in the file, in bytes, as PyTorch aligns its own.
_ALIGNMENT = 64


def load_base(model: GPT, base: Base) -> None:
    """Load the base's weights into a frozen network on the meta device, in this process's memory.

    Raises UserError as `load_weights` does.
    """
    model.to_empty(device="cpu")
    _load(model, base)


def map_base(model: GPT, base: Base, *, tell: Callable[[str], None] = log.warning) -> None:
    """As `load_base`, but in memory shared with other processes.

    If the cache cannot be written, this process keeps its own copy, and `tell` says so.
    """
    folder = cache_folder() / "frozen" / _digest(model, base)
    write = partial(_write, model, base)
    try:
        made_once(folder, write, what=f"the frozen weights of {base.source}")
    except CannotWrite as error:
        why = str(error).partition(";")[0]
        tell(f"this process keeps its own copy of {base.source}: {why}")
        load_base(model, base)
        return
    with (folder / _FILE).open("rb") as file:
        _place(model, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.detach().clone()
    model.usage = Usage.of(base.folder)


def _digest(model: nn.Module, base: Base) -> str:
    """A hash of everything that the file depends on."""
    layout = [(name, one.dtype, list(one.shape)) for name, one in model.state_dict().items()]
    rounded = base.quantized, ROUNDING
    text = repr((base.sha256, base.family, base.config, rounded, layout, versions()))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(model: GPT, base: Base, draft: Path) -> None:
    """Write the file to a folder.

    Raises UserError as `load_weights` does, CannotWrite if the disk is full.
    """
    size = sum(map(_aligned_size, model.state_dict().values()))
    make_room(size)
    told = size_words(size)
    log.info("writing the frozen weights of %s to the cache, once (%s)", base.source, told)
    memory = mmap.mmap(-1, size)  # unlike allocated memory, returned to the system at once
    _place(model, memory)
    _load(model, base)
    with storing(draft.parent), (draft / _FILE).open("wb") as file:
        file.write(memory)


def _load(model: GPT, base: Base) -> None:
    """Load the weights into a network's memory. Raises UserError as `load_weights` does."""
    if layers := quantized_layers(model):
        found = base_importance(base, base.quantized)
        for name, layer in layers.items():
            layer.importance = found.get(name)
    load_weights(model, base.folder, stored_rows=base.config.rows)


def _place(model: nn.Module, memory: mmap.mmap) -> None:
    """Place the tensors of a network in this memory, one after the other."""
    tensors, at = dict[str, Tensor](), 0
    for name, like in model.state_dict().items():
        flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=at)
        tensors[name] = flat.view(like.shape)
        at += _aligned_size(like)
    model.load_state_dict(tensors, assign=True)


def _aligned_size(tensor: Tensor) -> int:
    """The aligned size of a tensor, in bytes."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
