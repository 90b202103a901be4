"""A network's numbers as the native library reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model.gpt import GPT, Attention, Block
from gptray.model.layers import RMSNorm
from gptray.native import abi
from gptray.native.abi import PANEL

DTYPES = {abi.FP32: torch.float32, abi.BF16: torch.bfloat16, abi.INT8: torch.int8}
# Weights lie side by side in pieces of memory of this size, which the system makes of large pages:
# with small ones a step over many small layers takes a sixth to a third longer.
ROOM_BYTES = 32 << 20
# Of what the library reads at once, in bytes.
ALIGNMENT = 64
ACTIVATIONS = {"gelu_new": abi.GELU_TANH, "gelu": abi.GELU, "swiglu": abi.SWIGLU}


class Rooms:
    """Memory for weights that are read one after another, side by side."""

    def __init__(self) -> None:
        self._room = room((0,), torch.uint8)

    def place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory behind that given before; a room lasts as long as anything in it."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._room) < size:
            self._room = room((max(size, ROOM_BYTES),), torch.uint8)
        place, self._room = self._room[:size], self._room[-(-size // ALIGNMENT) * ALIGNMENT :]
        return place.view(dtype).view(*shape)


class NativeWeights:
    """Packs weights as one kind of numbers, and keeps alive what the library points to."""

    def __init__(self, model: GPT, kind: int) -> None:
        self._model, self._kind = model, kind
        self.count = 0  # of all linear layers
        self._kept: list[Tensor] = []
        self._rooms = Rooms()

    def model(self) -> abi.Model:
        """The whole network. Raises UserError for weights that cannot be read."""
        model = self._model
        config, transformer = model.config, model.transformer
        blocks = [self._block(block, config, layer) for layer, block in enumerate(transformer.h)]
        wpe = cos = sin = None
        if transformer.rotary:
            every = torch.arange(config.n_positions)
            cos, sin = transformer.rotary.at(every, torch.float32)
        else:
            wpe = self._whole(transformer.wpe.weight)
        return abi.Model(
            (abi.Block * len(blocks))(*blocks),
            *map(self._floats, (self._whole(transformer.wte.weight), wpe, cos, sin)),
            self._norm(transformer.ln_f),
            self._linear(self._whole(model.head)[: model.valid_vocab_size], None),
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_width,
            ACTIVATIONS[config.mlp],
            config.residual,
            config.parallel_residual,
            config.post_norm,
        )

    def _whole(self, parameter: Tensor) -> Tensor:
        """A parameter's numbers, which may still lie in a file."""
        return self._model.whole(parameter)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._whole(bias)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.contiguous())
        return self._kept[-1]

    def _floats(self, tensor: Tensor | None) -> abi.Float | None:
        return None if tensor is None else abi.Float.from_param(self._keep(tensor))

    def _block(self, block: nn.Module, config: ModelConfig, layer: int) -> abi.Block:
        assert isinstance(block, Block)
        attention, c_fc = block.attn, block.mlp.c_fc
        pack = self._gated if config.mlp == "swiglu" else self._linear
        # The scores' scale is in the rows that make q, unless a norm comes after them.
        scale: float = config.head_width**-0.5
        linear = (
            self._attention_input(attention, 1.0 if config.qk_norm else scale),
            self._layer(attention.c_proj),
            pack(self._whole(c_fc.weight), self._bias(c_fc.bias)),
            self._layer(block.mlp.c_proj),
        )
        for number, one in enumerate(linear, start=layer * len(linear)):
            one.number = number
        return abi.Block(
            self._norm(block.ln_1),
            self._norm(block.ln_2),
            self._norm(attention.q_norm, scale),
            self._norm(attention.k_norm),
            *linear,
            config.window(layer) or config.n_positions,
            config.rotary_width if config.rotates(layer) else 0,
        )

    def _norm(self, module: nn.Module | None, scale: float = 1.0) -> abi.Norm:
        if module is None or isinstance(module, nn.Identity):
            return abi.Norm(None, None, 0.0)
        assert isinstance(module, RMSNorm | nn.LayerNorm)
        bias = self._whole(module.bias) if isinstance(module, nn.LayerNorm) else None
        weight = self._whole(module.weight) * scale
        return abi.Norm(self._floats(weight), self._floats(bias), module.eps)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> abi.Linear:
        """weight (out, in), packed as [panel][word][64 outputs][numbers of a word]."""
        outputs, inputs = weight.shape
        self.count += outputs * inputs
        scale = zero = None
        if self._kind == abi.INT8:
            scale = weight.abs().amax(1).clamp_min(1e-12) / 127
            weight = (weight / scale[:, None]).round()
            zero = (128 * weight.sum(1)).to(torch.int32)
        dtype = DTYPES[self._kind]
        word = 4 // dtype.itemsize
        padded = F.pad(weight, (0, -inputs % word, 0, -outputs % PANEL)).to(dtype)
        panels = padded.view(-1, PANEL, padded.size(1) // word, word).transpose(1, 2)
        packed = self._keep(self._rooms.place(panels.shape, dtype).copy_(panels))
        return abi.Linear(
            packed.data_ptr(),
            self._floats(bias),
            self._floats(scale),
            None if zero is None else abi.Int.from_param(self._keep(zero)),
            inputs,
            outputs,
            self._kind,
            -1,
        )

    def _gated(self, weight: Tensor, bias: Tensor | None) -> abi.Linear:
        """A layer of gates and what they let through."""
        return self._linear(woven(weight), None if bias is None else woven(bias).flatten())

    def _layer(self, layer: nn.Linear) -> abi.Linear:
        return self._linear(self._whole(layer.weight), self._bias(layer.bias))

    def _attention_input(self, attention: Attention, scale: float) -> abi.Linear:
        """c_attn, with its outputs that make q times `scale`."""
        layer = attention.c_attn
        scales = torch.ones(layer.out_features)
        scales[: attention.n_head * attention.head_width] = scale
        bias = self._bias(layer.bias)
        return self._linear(
            self._whole(layer.weight) * scales[:, None], None if bias is None else bias * scales
        )


def woven(both: Tensor) -> Tensor:
    """Rows of gates and then of what they let through, half a panel of each in every panel."""
    inner = len(both) // 2
    halves = F.pad(both.view(2, inner, -1), (0, 0, 0, -inner % (PANEL // 2)))
    blocks = halves.view(2, -1, PANEL // 2, halves.size(2))
    return blocks.transpose(0, 1).flatten(0, 2)


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that is not touched yet; NumPy asks the system for large pages, PyTorch does not."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.empty(size + ALIGNMENT, np.uint8))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(*shape)
