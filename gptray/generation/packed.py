"""A GPT with its weights packed for generation, in the dtype that it computes in.

Shapes: N tokens, C = n_embd, H heads, K heads of keys and values, E = head width, V the vocabulary,
padded to a whole number of the sampler's chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.generation.adapted_rows import LAYERS, Layer, Run, run_plain
from gptray.generation.choosing import CHUNK
from gptray.generation.product_timing import choose_kernels
from gptray.generation.products import Product, product
from gptray.model.gpt import GPT, Block
from gptray.model.importance import input_importance
from gptray.model.layers import RMSNorm, activation, rms_norm
from gptray.model.quantized import head_kind
from gptray.model.rotary import Angles, rotate

# Of an MLP, as torch calls them.
GELUS = {"gelu_new": "tanh", "gelu": "none"}

# From a layer's number and its q, k, v, (N, (H + 2 K) E), to what it attended to, (N, H E).
Attend = Callable[[int, Tensor], Tensor]
# `GPT.full_tensor`
FullTensor = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class PackedGPT:
    """The network but for attention, which depends on where keys and values are kept.

    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head. rows: of
    a step in which no prompt is read; on a GPU kernels are chosen for them.
    """

    def __init__(
        self, model: GPT, dtype: torch.dtype, *, rows: int, quantize: str = "none"
    ) -> None:
        transformer = model.transformer
        self.vocab_size, self.dtype = model.valid_vocab_size, dtype
        self._scale = model.config.embedding_scale
        config, full = model.config, model.full_tensor
        wte = full(transformer.wte.weight)
        self._rotary = transformer.rotary
        # First, since the padded copy that it packs is the largest.
        weight = wte if model.lm_head is None else full(model.head)
        head = F.pad(weight[: self.vocab_size], (0, 0, 0, -self.vocab_size % CHUNK))
        self._head = product(head, None, dtype, quantized=head_kind(quantize))
        del weight, head
        # A sum with positions is rounded once.
        self._wte = wte.to(dtype) if self._rotary else wte
        self._wpe = None if self._rotary else full(transformer.wpe.weight)
        del wte
        importance = input_importance(model, quantize)
        self._blocks = [
            _block(cast(Block, block), layer, config, full, dtype, quantize, importance)
            for layer, block in enumerate(transformer.h)
        ]
        self._ln_f = _norm(transformer.ln_f, full, dtype)
        choose_kernels(
            [self._head, *chain.from_iterable(one.products for one in self._blocks)], rows
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._wte.device

    def hidden(
        self, tokens: Tensor, positions: Tensor, attend: Attend, run: Run = run_plain
    ) -> Tensor:
        """What the last block gives for N tokens at their positions, (N, C)."""
        x, angles = F.embedding(tokens, self._wte), list[Angles | None]()
        if self._scale != 1:
            x = x * self._scale
        if self._rotary:
            angles += self._rotary.at(positions, self.dtype)
        if self._wpe is not None:
            angles += [None] * len(self._blocks)
            x = x + F.embedding(positions, self._wpe)
        x = x.to(self.dtype)
        for layer, (block, own) in enumerate(zip(self._blocks, angles, strict=True)):
            x = block(x, own, partial(attend, layer), run)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) in `dtype`; -inf where V is padded."""
        logits = self._head(self._ln_f(hidden))
        logits[:, self.vocab_size :] = float("-inf")
        return logits


@dataclass(frozen=True)
class _Queries:
    """q and k of a layer as its scores take them: normalised and rotated; q times 1 / sqrt(E)."""

    n_head: int
    kv_heads: int
    width: int
    q_norm: Norm
    k_norm: Norm
    rotates: bool
    is_wide: bool

    def __call__(self, qkv: Tensor, angles: Angles | None) -> Tensor:
        """q, k, v (N, (H + 2 K) E)."""
        if self.q_norm is _same and not self.rotates:
            return qkv
        if self.is_wide:
            K = self.kv_heads * self.width
            parts = torch.split(qkv, [qkv.size(1) - 2 * K, K, K], dim=1)
            qkv = torch.cat((self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]), dim=1)
        heads = qkv.view(len(qkv), -1, self.width)
        q, k, v = torch.split(heads, [self.n_head, self.kv_heads, self.kv_heads], dim=1)
        if not self.is_wide:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            assert angles is not None
            q, k = rotate(q, angles), rotate(k, angles)
        return torch.cat((q, k, v), dim=1).flatten(1)


@dataclass(frozen=True)
class _Block:
    before_attn: Norm
    after_attn: Norm
    c_attn: Layer
    queries: _Queries
    attn_proj: Layer
    before_mlp: Norm
    after_mlp: Norm
    c_fc: Layer
    mlp_proj: Layer
    gated: str | None
    residual: bool
    parallel: bool

    @property
    def products(self) -> list[Product]:
        layers = self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj
        return [layer.product for layer in layers]

    def __call__(
        self, x: Tensor, angles: Angles | None, attend: Callable[[Tensor], Tensor], run: Run
    ) -> Tensor:
        qkv = self.queries(run(self.c_attn, self.before_attn(x)), angles)
        to = x if self.residual else None
        y = self._add(run, self.attn_proj, attend(qkv), self.after_attn, to)
        inner = run(self.c_fc, self.before_mlp(x if self.parallel else y))
        if self.gated:
            inner = activation(inner, self.gated)
        to = y if self.residual or self.parallel else None
        return self._add(run, self.mlp_proj, inner, self.after_mlp, to)

    def _add(self, run: Run, proj: Layer, inner: Tensor, norm: Norm, to: Tensor | None) -> Tensor:
        if norm is _same:
            return run(proj, inner, to)
        made = norm(run(proj, inner))
        return made if to is None else to + made


def _same(x: Tensor) -> Tensor:
    return x


def _norm(module: nn.Module | None, full: FullTensor, dtype: torch.dtype, scale: float = 1) -> Norm:
    if module is None or isinstance(module, nn.Identity):
        return _same
    if isinstance(module, RMSNorm):
        weight = ((full(module.weight) + module.less) * scale).to(dtype)
        return partial(rms_norm, weight=weight, eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    weight, bias = full(module.weight).to(dtype), full(module.bias).to(dtype)
    shape = list(weight.shape)
    return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=module.eps)


def _block(
    block: Block,
    layer: int,
    config: ModelConfig,
    full: FullTensor,
    dtype: torch.dtype,
    quantize: str,
    importance: Mapping[str, Tensor],
) -> _Block:
    attention = block.attn
    modules = block.named_modules(prefix=f"transformer.h.{layer}")
    counts = {module: importance.get(f"{name}.weight") for name, module in modules}
    numbers = count(layer * len(LAYERS))

    def packed(layer: nn.Linear, gelu: str | None = None, factors: Tensor | None = None) -> Layer:
        """The next layer, its outputs times `factors` (out,)."""
        weight, bias = full(layer.weight), None if layer.bias is None else full(layer.bias)
        if factors is not None:
            factors = factors.to(weight.device)
            bias = None if bias is None else bias * factors
        made = product(
            *(weight, bias, dtype),
            quantized=quantize,
            importance=counts[layer],
            factors=factors,
            gelu=gelu,
        )
        return Layer(next(numbers), made)

    # The scores' scale is in the rows that make q, unless a norm comes after them.
    scale = 1.0 / math.sqrt(config.head_width)
    factors = torch.ones(attention.c_attn.out_features)
    factors[: config.n_head * config.head_width] = scale
    queries = _Queries(
        config.n_head,
        config.kv_heads,
        config.head_width,
        _norm(attention.q_norm, full, dtype, scale),
        _norm(attention.k_norm, full, dtype),
        config.rotates(layer),
        config.wide_qk_norm,
    )
    norms = [_norm(norm, full, dtype) for norm in block.norms]
    return _Block(
        before_attn=norms[0],
        after_attn=norms[1],
        c_attn=packed(attention.c_attn, factors=None if config.qk_norm else factors),
        queries=queries,
        attn_proj=packed(attention.c_proj),
        before_mlp=norms[2],
        after_mlp=norms[3],
        c_fc=packed(block.mlp.c_fc, GELUS.get(config.mlp)),
        mlp_proj=packed(block.mlp.c_proj),
        gated=config.mlp if config.is_gated else None,
        residual=config.residual,
        parallel=config.parallel_residual,
    )
