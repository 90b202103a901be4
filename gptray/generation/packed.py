"""A GPT with its weights packed for generation, in the dtype that it computes in.

Shapes: N tokens, C = n_embd, V the vocabulary, padded to a whole number of the sampler's chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.generation.choosing import CHUNK
from gptray.generation.products import Product, product
from gptray.model.gpt import GPT, Attention, Block

# From a layer's number and its q, k, v, (N, 3C), to what it attended to, (N, C).
Attend = Callable[[int, Tensor], Tensor]
# `GPT.whole`
Whole = Callable[[Tensor], Tensor]


class PackedGPT:
    """The network but for attention, which depends on where keys and values are kept.

    quantize: "int8" for the weights of all linear layers and of the head.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, *, quantize: str = "none") -> None:
        transformer = model.transformer
        self.vocab_size, self.dtype = model.valid_vocab_size, dtype
        whole = model.whole
        self._wte, self._wpe = whole(transformer.wte.weight), whole(transformer.wpe.weight)
        # First, since the padded copy that it packs is the largest.
        head = F.pad(self._wte[: self.vocab_size], (0, 0, 0, -self.vocab_size % CHUNK))
        self.logits_width = len(head)
        self._head = product(head, None, dtype, quantize=quantize)
        del head
        self._blocks = [
            _block(cast(Block, block), model.config.residual, whole, dtype, quantize)
            for block in transformer.h
        ]
        self._ln_f = _norm(transformer.ln_f, whole, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._wte.device

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """What the last block gives for N tokens at their positions, (N, C)."""
        x = (F.embedding(tokens, self._wte) + F.embedding(positions, self._wpe)).to(self.dtype)
        for layer, block in enumerate(self._blocks):
            attended = attend(layer, block.c_attn(block.ln_1(x)))
            x = block.attn_proj(attended, x if block.residual else None)
            x = block.mlp_proj(block.c_fc(block.ln_2(x)), x if block.residual else None)
        return x

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (N, V) in fp32, in `out` where that is given; -inf where V is padded."""
        logits = self._head(self._ln_f(hidden))
        logits = logits.float() if out is None else out.copy_(logits)
        logits[:, self.vocab_size :] = float("-inf")
        return logits


@dataclass(frozen=True)
class _Norm:
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Block:
    ln_1: _Norm
    c_attn: Product
    attn_proj: Product
    ln_2: _Norm
    c_fc: Product
    mlp_proj: Product
    residual: bool


def _norm(module: nn.Module, whole: Whole, dtype: torch.dtype) -> _Norm:
    if isinstance(module, nn.Identity):
        return _Norm(None, None, 0.0)
    assert isinstance(module, nn.LayerNorm)
    return _Norm(whole(module.weight).to(dtype), whole(module.bias).to(dtype), module.eps)


def _block(block: Block, residual: bool, whole: Whole, dtype: torch.dtype, quantize: str) -> _Block:
    return _Block(
        ln_1=_norm(block.ln_1, whole, dtype),
        c_attn=_scaled_attention_input(block.attn, whole, dtype, quantize),
        attn_proj=_product(block.attn.c_proj, whole, dtype, quantize),
        ln_2=_norm(block.ln_2, whole, dtype),
        c_fc=_product(block.mlp.c_fc, whole, dtype, quantize, gelu=True),
        mlp_proj=_product(block.mlp.c_proj, whole, dtype, quantize),
        residual=residual,
    )


def _product(
    layer: nn.Linear, whole: Whole, dtype: torch.dtype, quantize: str, *, gelu: bool = False
) -> Product:
    weight, bias = whole(layer.weight), whole(layer.bias)
    return product(weight, bias, dtype, quantize=quantize, gelu=gelu)


def _scaled_attention_input(
    attention: Attention, whole: Whole, dtype: torch.dtype, quantize: str
) -> Product:
    """c_attn with the scores' 1 / sqrt(E) in the rows that make q."""
    layer, C = attention.c_attn, attention.c_attn.in_features
    scale = torch.ones(3 * C, 1, device=layer.weight.device)
    scale[:C] = 1.0 / math.sqrt(C // attention.n_head)
    weight, bias = whole(layer.weight) * scale, whole(layer.bias) * scale[:, 0]
    return product(weight, bias, dtype, quantize=quantize)
