"""A network's weights in the layout that the native library reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.model.attention import Attention
from gptray.model.gpt import GPT, Block
from gptray.model.importance import input_importance
from gptray.model.layers import RMSNorm
from gptray.model.quantized import QuantizedWeight, head_kind, quantize
from gptray.model.rotary import Angles
from gptray.native import abi
from gptray.native.abi import GROUP, LANES, PANEL

DTYPES = {abi.FP32: torch.float32, abi.BF16: torch.bfloat16, abi.INT8: torch.uint8}
QUANTIZED = {"int8": abi.INT8, "int4": abi.INT4, "iq4_nl": abi.IQ4_NL}
# Weights lie side by side in pieces of memory of this size, which the system makes of large pages:
# with small ones a step over many small layers takes a sixth to a third longer.
ROOM_BYTES = 32 << 20
# Of what the library reads at once, in bytes.
ALIGNMENT = 64
ACTIVATIONS = {
    "gelu_new": abi.GELU_TANH,
    "gelu": abi.GELU,
    "swiglu": abi.SWIGLU,
    "geglu": abi.GEGLU,
}


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
    """Packs weights as one kind of numbers, and keeps alive what the library points to.

    dtype: fp32 or bf16, unless quantize names a kind of QUANTIZED.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, quantize: str) -> None:
        self._model, self._dtype, self._quantize = model, dtype, quantize
        self._full = model.full_tensor  # a parameter's numbers, which may still lie in a file
        self.count = 0  # of all linear layers
        self._kept: list[Tensor] = []
        self._importance: dict[Tensor, Tensor | None] = {}
        self._rooms = Rooms()

    def model(self) -> abi.Model:
        """The whole network. Raises UserError for weights that cannot be read."""
        model = self._model
        config, transformer = model.config, model.transformer
        # The largest first: while it is packed, memory holds it more than once.
        wte, head = self._embedding_and_head()
        found = input_importance(model, self._quantize)
        self._importance = {one: found.get(name) for name, one in model.named_parameters()}
        wpe, angles = None, list[Angles | None]()
        if transformer.rotary:
            angles += transformer.rotary.at(torch.arange(config.n_positions), torch.float32)
        else:
            wpe = self._full(transformer.wpe.weight)
            angles += [None] * config.n_layer
        both = zip(transformer.h, angles, strict=True)
        blocks = [self._block(block, layer, own) for layer, (block, own) in enumerate(both)]
        return abi.Model(
            (abi.Block * len(blocks))(*blocks),
            *map(self._floats, (wte, wpe)),
            self._norm(transformer.ln_f),
            head,
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_width,
            ACTIVATIONS[config.mlp],
            config.residual,
            config.parallel_residual,
            config.wide_qk_norm,
            config.embedding_scale,
        )

    def _embedding_and_head(self) -> tuple[Tensor | None, abi.Linear]:
        """The embedding, or None where a tied head's panels hold the same numbers; and the head."""
        model = self._model
        wte = self._full(model.transformer.wte.weight)
        weight = wte if model.lm_head is None else self._full(model.head)
        head = self._linear(
            weight[: model.valid_vocab_size], None, quantized=head_kind(self._quantize)
        )
        is_there = self._quantize == "none" and model.lm_head is None
        if is_there and wte.to(self._dtype).float().equal(wte):
            return None, head
        return wte, head

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._full(bias)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.contiguous())
        return self._kept[-1]

    def _floats(self, tensor: Tensor | None) -> abi.Float | None:
        return None if tensor is None else abi.Float.from_param(self._keep(tensor))

    def _block(self, block: nn.Module, layer: int, angles: Angles | None) -> abi.Block:
        assert isinstance(block, Block)
        config, attention = self._model.config, block.attn
        pack = self._gated if config.is_gated else self._layer
        # The scores' scale is in the rows that make q, unless a norm comes after them.
        scale: float = config.head_width**-0.5
        linear = (
            self._attention_input(attention, 1.0 if config.qk_norm else scale),
            self._layer(attention.c_proj),
            pack(block.mlp.c_fc),
            self._layer(block.mlp.c_proj),
        )
        for number, one in enumerate(linear, start=layer * len(linear)):
            one.number = number
        return abi.Block(
            *map(self._norm, block.norms),
            self._norm(attention.q_norm, scale),
            self._norm(attention.k_norm),
            *linear,
            config.window(layer) or config.n_positions,
            config.rotary_width if angles else 0,
            *map(self._floats, angles or (None, None)),
        )

    def _norm(self, module: nn.Module | None, scale: float = 1.0) -> abi.Norm:
        if module is None or isinstance(module, nn.Identity):
            return abi.Norm(None, None, 0.0)
        assert isinstance(module, RMSNorm | nn.LayerNorm)
        bias = self._full(module.bias) if isinstance(module, nn.LayerNorm) else None
        less = module.less if isinstance(module, RMSNorm) else 0.0
        weight = (self._full(module.weight) + less) * scale
        return abi.Norm(self._floats(weight), self._floats(bias), module.eps)

    def _linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        factors: Tensor | None = None,
        quantized: str | None = None,
        importance: Tensor | None = None,
    ) -> abi.Linear:
        """weight (out, in), its outputs times `factors` (out,); quantized: unless as all are."""
        outputs, inputs = weight.shape
        self.count += outputs * inputs
        kind, scale = quantized or self._quantize, None
        if kind == "none":
            number = abi.BF16 if self._dtype == torch.bfloat16 else abi.FP32
            packed = self._panels(weight if factors is None else weight * factors[:, None], number)
        else:
            number, made = QUANTIZED[kind], quantize(weight, kind, importance).times(factors)
            if number != abi.INT8:
                packed = self._groups(made)
            else:
                packed = self._panels(made.values.view(torch.uint8) ^ 128, number)  # unsigned
                scale = made.scales[:, 0].float()
        return abi.Linear(
            packed.data_ptr(),
            self._floats(bias),
            self._floats(scale),
            inputs,
            outputs,
            number,
            -1,
        )

    def _panels(self, weight: Tensor, kind: int) -> Tensor:
        """weight (out, in) as [panel][word][64 outputs][numbers of a word]."""
        dtype = DTYPES[kind]
        word = 4 // dtype.itemsize
        padded = F.pad(weight, (0, -weight.size(1) % word, 0, -len(weight) % PANEL)).to(dtype)
        panels = padded.view(-1, PANEL, padded.size(1) // word, word).transpose(1, 2)
        return self._keep(self._rooms.place(panels.shape, dtype).copy_(panels))

    def _groups(self, weight: QuantizedWeight) -> Tensor:
        """Weights of 4 bits as [panel][group] of grouped_decode.h's PanelGroup, in bytes."""
        below = -len(weight.values) % PANEL
        codes = F.pad(weight.codes(), (0, -weight.inputs % GROUP, 0, below))
        # (panels, blocks, 16 outputs, groups, halves of a byte, words, numbers of a word)
        blocks = codes.view(-1, PANEL // LANES, LANES, codes.size(1))
        halves = blocks.view(*blocks.shape[:-1], -1, 2, GROUP // 8, 4)
        pairs = (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).permute(0, 3, 4, 1, 2, 5)
        scales = F.pad(weight.scales, (0, 0, 0, below)).view(-1, PANEL, pairs.size(1))
        both = pairs.flatten(2), scales.transpose(1, 2).contiguous().view(torch.uint8)
        width = sum(part.size(2) for part in both)
        placed = self._rooms.place((*pairs.shape[:2], width), torch.uint8)
        return self._keep(torch.cat(both, dim=2, out=placed))

    def _gated(self, layer: nn.Linear) -> abi.Linear:
        """A layer that makes gates and inputs."""
        bias = None if layer.bias is None else woven(self._full(layer.bias)).flatten()
        counts = self._importance[layer.weight]
        return self._linear(woven(self._full(layer.weight)), bias, importance=counts)

    def _layer(self, layer: nn.Linear) -> abi.Linear:
        counts = self._importance[layer.weight]
        return self._linear(self._full(layer.weight), self._bias(layer.bias), importance=counts)

    def _attention_input(self, attention: Attention, scale: float) -> abi.Linear:
        """c_attn, with its outputs that make q times `scale`."""
        layer = attention.c_attn
        factors = torch.ones(layer.out_features)
        factors[: attention.n_head * attention.head_width] = scale
        bias = self._bias(layer.bias)
        return self._linear(
            self._full(layer.weight),
            None if bias is None else bias * factors,
            factors=factors,
            importance=self._importance[layer.weight],
        )


def woven(both: Tensor) -> Tensor:
    """Rows of gates, then of inputs -> panels that are half gates and half inputs."""
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
