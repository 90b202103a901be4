"""Packs a network's weights in the layout that the native library reads (gptray/native/decode.h).

Shapes: (out, in) as torch's linear layers; a panel is 64 outputs, a word 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.generation.adapted_rows import INTO_MLP, LAYERS, output_factors
from gptray.model.gpt import GPT, Block
from gptray.model.importance import input_importance
from gptray.model.layers import Linear, RMSNorm
from gptray.model.quantized import QuantizedWeight, head_kind, quantize
from gptray.model.rotary import Angles
from gptray.native import abi
from gptray.native.abi import GROUP, LANES, PANEL, load_library
from gptray.native.backend import GENERATE_KEY

DTYPES = {abi.FP32: torch.float32, abi.BF16: torch.bfloat16, abi.INT8: torch.uint8}
QUANTIZED = {"int8": abi.INT8, "int4": abi.INT4, "iq4_nl": abi.IQ4_NL}
# Weights are placed side by side in blocks of memory of this size, for which the system uses large
# pages: with small pages, a step over many small layers takes a sixth to a third longer.
ARENA_BYTES = 32 << 20
# Bytes of a cache line, on which every weight begins.
ALIGNMENT = 64


class Arena:
    """Memory for weights that are read one after another, side by side."""

    def __init__(self) -> None:
        self._free = untouched((0,), torch.uint8)

    def place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory next to that returned before; a block lives as long as any tensor in it."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._free) < size:
            self._free = untouched((max(size, ARENA_BYTES),), torch.uint8)
        place, self._free = self._free[:size], self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        return place.view(dtype).view(*shape)


class NativeWeights:
    """Packs a network's weights, and keeps alive the memory that the library points to.

    dtype: fp32 or bf16, for linear layers that are not quantized. count: weights packed so far.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, quantize: str) -> None:
        self._model, self._dtype, self._quantize = model, dtype, quantize
        self._full = model.full_tensor  # reads a parameter, which may still be in a file
        self.count = 0
        self._kept: list[Tensor] = []
        self._importance: dict[Tensor, Tensor | None] = {}
        self._arena = Arena()

    def model(self) -> abi.Model:
        """Pack the whole network. Raises UserError for weights that cannot be read."""
        model = self._model
        config, transformer = model.config, model.transformer
        # The largest first, while little else takes memory: packing holds copies of it.
        wte, head = self._embedding_and_head()
        importance = input_importance(model, self._quantize)
        self._importance = {one: importance.get(name) for name, one in model.named_parameters()}
        wpe, angles = None, list[Angles | None]()
        if transformer.rotary:
            angles += transformer.rotary.at(torch.arange(config.n_positions), torch.float32)
        else:
            wpe = self._full(transformer.wpe.weight)
            angles += [None] * config.n_layer
        pairs = enumerate(zip(transformer.h, angles, strict=True))
        blocks = [self._block(block, layer, own) for layer, (block, own) in pairs]
        return abi.Model(
            (abi.Block * len(blocks))(*blocks),
            *map(self._floats, (wte, wpe)),
            # What divides the logits is in the norm before the head.
            self._norm(transformer.ln_f, 1 / config.logits_scaling),
            head,
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_width,
            abi.ACTIVATIONS[config.mlp],
            config.residual,
            config.parallel_residual,
            config.wide_qk_norm,
            config.embedding_scale,
        )

    def _embedding_and_head(self) -> tuple[Tensor | None, abi.Linear]:
        """The embedding, or None if a tied head's panels hold the same numbers; and the head."""
        model = self._model
        wte = self._full(model.transformer.wte.weight)
        weight = wte if model.lm_head is None else self._full(model.head)
        head = self._linear(
            weight[: model.valid_vocab_size], None, quantized=head_kind(self._quantize)
        )
        is_shared = self._quantize == "none" and model.lm_head is None
        if is_shared and wte.to(self._dtype).float().equal(wte):
            return None, head
        return wte, head

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.contiguous())
        return self._kept[-1]

    def _floats(self, tensor: Tensor | None) -> abi.Float | None:
        return None if tensor is None else abi.Float.from_param(self._keep(tensor))

    def _block(self, block: nn.Module, layer: int, angles: Angles | None) -> abi.Block:
        assert isinstance(block, Block)
        config, attention = self._model.config, block.attn
        linear = [self._layer(block, name) for name in LAYERS]
        for number, one in enumerate(linear, start=layer * len(linear)):
            one.number = number
        return abi.Block(
            *map(self._norm, block.norms),
            self._norm(attention.q_norm, config.score_scale),
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
        bias = self._full(module.bias) * scale if isinstance(module, nn.LayerNorm) else None
        offset = module.offset if isinstance(module, RMSNorm) else 0.0
        weight = (self._full(module.weight) + offset) * scale
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
        """A layer with weight (out, in), its outputs times `factors` (out,).

        quantized: this layer's own kind; None takes the network's. importance: (in,), for it.
        """
        outputs, inputs = weight.shape
        self.count += outputs * inputs
        quantized, scale = quantized or self._quantize, None
        if quantized == "none":
            kind = abi.BF16 if self._dtype == torch.bfloat16 else abi.FP32
            packed = self._panels(weight if factors is None else weight * factors[:, None], kind)
        else:
            kind, rounded = QUANTIZED[quantized], quantize(weight, quantized, importance)
            rounded = rounded.times(factors)
            if kind != abi.INT8:
                packed = self._groups(rounded)
            else:
                packed = self._panels(rounded.values.view(torch.uint8) ^ 128, kind)  # unsigned
                scale = rounded.scales[:, 0].float()
        floats = map(self._floats, (bias, scale))
        linear = abi.Linear(packed.data_ptr(), *floats, inputs, outputs, kind, -1)
        load_library(key=GENERATE_KEY).pair_weights(linear)
        return linear

    def _panels(self, weight: Tensor, kind: int) -> Tensor:
        """Pack weight (out, in) as [panel][word][64 outputs][numbers of a word]."""
        dtype = DTYPES[kind]
        word = 4 // dtype.itemsize
        padded = F.pad(weight, (0, -weight.size(1) % word, 0, -len(weight) % PANEL)).to(dtype)
        panels = padded.view(-1, PANEL, padded.size(1) // word, word).transpose(1, 2)
        return self._keep(self._arena.place(panels.shape, dtype).copy_(panels))

    def _groups(self, weight: QuantizedWeight) -> Tensor:
        """Pack 4-bit weights as [panel][group] of grouped_decode.h's PanelGroup, in bytes."""
        below = -len(weight.values) % PANEL
        codes = F.pad(weight.codes(), (0, -weight.inputs % GROUP, 0, below))
        # (panels, blocks, 16 outputs, groups, halves of a byte, words, numbers of a word)
        blocks = codes.view(-1, PANEL // LANES, LANES, codes.size(1))
        halves = blocks.view(*blocks.shape[:-1], -1, 2, GROUP // 8, 4)
        pairs = (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).permute(0, 3, 4, 1, 2, 5)
        scales = F.pad(weight.scales, (0, 0, 0, below)).view(-1, PANEL, pairs.size(1))
        both = pairs.flatten(2), scales.transpose(1, 2).contiguous().view(torch.uint8)
        width = sum(part.size(2) for part in both)
        placed = self._arena.place((*pairs.shape[:2], width), torch.uint8)
        return self._keep(torch.cat(both, dim=2, out=placed))

    def _layer(self, block: Block, name: str) -> abi.Linear:
        """Pack one of LAYERS."""
        # A Linear, or in training what stands for one: LoRALinear.
        layer = cast(Linear, block.get_submodule(name))
        factors = output_factors(name, self._model.config)
        weight, bias = self._full(layer.weight), None
        if layer.bias is not None:
            bias = self._full(layer.bias) if factors is None else self._full(layer.bias) * factors
        if name == INTO_MLP and self._model.config.is_gated:
            weight, bias = (
                interleaved(weight),
                None if bias is None else interleaved(bias).flatten(),
            )
        importance = self._importance.get(layer.weight)
        return self._linear(weight, bias, factors=factors, importance=importance)


def interleaved(both: Tensor) -> Tensor:
    """Rows of gates, then of the values they gate -> panels that are half gates, half values."""
    inner = len(both) // 2
    halves = F.pad(both.view(2, inner, -1), (0, 0, 0, -inner % (PANEL // 2)))
    blocks = halves.view(2, -1, PANEL // 2, halves.size(2))
    return blocks.transpose(0, 1).flatten(0, 2)


def untouched(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Aligned memory that is not yet written to, from NumPy, which asks for large pages."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.empty(size + ALIGNMENT, np.uint8))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(*shape)
