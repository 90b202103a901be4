"""A GPT as generation runs it: packed weights, flat steps, a preallocated cache of keys and values.

A step carries tokens of many sequences side by side: one each for those that are decoding, a piece
of the prompt for those that begin. No token is padding. What a sequence gets does not depend on
its neighbours: every product runs over a token's own row.

Shapes: N tokens of a step, S slots, D sequences decoding, H heads, E = head width, C = n_embd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.generation.products import Product, product
from gptray.generation.sampling import CHUNK
from gptray.model.gpt import GPT, Attention, Block

# Keys are read up to a multiple of this: sums over them then group in the same way at any length.
LENGTH_STEP = 64


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: its tokens stand at `start` and on, in the cache's `slot`."""

    slot: int
    start: int
    tokens: Sequence[int]


class Cache:
    """Keys and values of every layer for S sequences of up to P tokens, in memory taken once.

    Products are several times faster over keys that lie side by side than over slices of longer
    rows. So each layer's memory is seen as (S, H, length, E) with the least `length` that holds
    the longest sequence, and is laid out anew when that changes: once in LENGTH_STEP tokens.
    """

    def __init__(self, model: GPT, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self._slots, self._n_head = slots, config.n_head
        self._head_width = config.n_embd // config.n_head
        numbers = slots * config.n_embd * _rounded(config.n_positions)
        self._memory = [
            (
                torch.zeros(numbers, dtype=dtype, device=device),
                torch.zeros(numbers, dtype=dtype, device=device),
            )
            for _ in range(config.n_layer)
        ]
        self.length = LENGTH_STEP
        self.layers = [(self._view(k), self._view(v)) for k, v in self._memory]

    def fit(self, tokens: int, used: int) -> None:
        """Make room for sequences of `tokens`, keeping what slots 0 .. used - 1 hold."""
        length = _rounded(tokens)
        # A sequence that ends often makes way for one as long: do not shrink for a little.
        if self.length // 2 < length <= self.length:
            return
        kept = min(length, self.length)
        self.length = length
        before, self.layers = self.layers, []
        for (old_k, old_v), (k, v) in zip(before, self._memory, strict=True):
            old = old_k[:used, :, :kept].clone(), old_v[:used, :, :kept].clone()
            keys, values = self._view(k), self._view(v)
            keys[:used, :, :kept], values[:used, :, :kept] = old
            self.layers.append((keys, values))

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of one slot over another's."""
        for keys, values in self.layers:
            keys[target, :, :tokens] = keys[source, :, :tokens]
            values[target, :, :tokens] = values[source, :, :tokens]

    def _view(self, memory: Tensor) -> Tensor:
        shape = (self._slots, self._n_head, self.length, self._head_width)
        return memory[: math.prod(shape)].view(shape)


def _rounded(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


class Decoder:
    """The network in `dtype`, its weights packed once for the products of generation.

    quantize: "int8" for the weights of all linear layers and of the head.
    """

    def __init__(self, model: GPT, *, dtype: torch.dtype, quantize: str = "none") -> None:
        self.dtype = dtype
        self.valid_vocab_size = model.valid_vocab_size
        transformer = model.transformer
        self.device = transformer.wte.weight.device
        self._wte, self._wpe = transformer.wte.weight.detach(), transformer.wpe.weight.detach()
        self._blocks = [
            _block(cast(Block, block), model.config.residual, dtype, quantize)
            for block in transformer.h
        ]
        self._ln_f = _norm(transformer.ln_f, dtype)
        # A whole number of the sampler's chunks, so that it need not copy the logits.
        head = self._wte[: self.valid_vocab_size]
        self._head = product(
            F.pad(head, (0, 0, 0, -head.size(0) % CHUNK)), None, dtype, quantize=quantize
        )

    @torch.no_grad()
    def step(
        self, decoding: Sequence[tuple[int, int]], pieces: Sequence[Piece], cache: Cache
    ) -> Tensor:
        """Logits (D + pieces, V) after each decoding token and each piece's last, in `dtype`.

        V is the vocabulary, padded with -inf. decoding: (token, position) of slots 0 .. D - 1.
        Keys and values go into the cache.
        """
        tokens = [token for token, _ in decoding]
        positions = [position for _, position in decoding]
        last = list(range(len(tokens)))
        for piece in pieces:
            tokens += piece.tokens
            positions += range(piece.start, piece.start + len(piece.tokens))
            last.append(len(tokens) - 1)
        place = torch.tensor(positions, device=self.device)
        ids = torch.tensor(tokens, device=self.device)
        x = (F.embedding(ids, self._wte) + F.embedding(place, self._wpe)).to(self.dtype)
        used = len(decoding) + len(pieces)
        cache.fit(max(positions) + 1, used)
        plan = _AttentionPlan(
            positions[: len(decoding)], pieces, cache.length, self.dtype, self.device
        )
        for block, (keys, values) in zip(self._blocks, cache.layers, strict=True):
            x = block(x, keys, values, plan)
        logits = self._head(self._ln_f(x[last] if pieces else x))
        logits[:, self.valid_vocab_size :] = float("-inf")
        return logits


class _AttentionPlan:
    """What attention of a step needs in every layer, made once: places, masks, groups of pieces."""

    def __init__(
        self,
        positions: Sequence[int],
        pieces: Sequence[Piece],
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.decoding = len(positions)
        self.slots = torch.arange(self.decoding, device=device)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        beyond = torch.arange(length, device=device) > self.positions[:, None]
        self.mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
        self.mask.masked_fill_(beyond, float("-inf")).unsqueeze_(1)  # (D, 1, length)
        self.pieces = []
        row = self.decoding
        for piece in pieces:
            T = len(piece.tokens)
            self.pieces.append((piece.slot, row, T, piece.start))
            row += T


@dataclass(frozen=True)
class _Block:
    ln_1: _Norm
    c_attn: Product
    attn_proj: Product
    ln_2: _Norm
    c_fc: Product
    mlp_proj: Product
    n_head: int
    residual: bool

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, plan: _AttentionPlan) -> Tensor:
        attended = self._attend(self.c_attn(self.ln_1(x)), keys, values, plan)
        x = self.attn_proj(attended, x if self.residual else None)
        return self.mlp_proj(self.c_fc(self.ln_2(x)), x if self.residual else None)

    def _attend(self, qkv: Tensor, keys: Tensor, values: Tensor, plan: _AttentionPlan) -> Tensor:
        """Store the step's keys and values; attend. qkv (N, 3C), returns (N, C)."""
        N, C = qkv.size(0), qkv.size(1) // 3
        q, k, v = qkv.view(N, 3, self.n_head, C // self.n_head).unbind(1)  # (N, H, E)
        D = plan.decoding
        parts = []
        if D:
            keys[plan.slots, :, plan.positions] = k[:D]
            values[plan.slots, :, plan.positions] = v[:D]
            parts.append(_attend_one(q[:D], keys[:D], values[:D], plan.mask))
        for slot, row, T, start in plan.pieces:
            keys[slot, :, start : start + T] = k[row : row + T].transpose(0, 1)
            values[slot, :, start : start + T] = v[row : row + T].transpose(0, 1)
            parts.append(_attend_piece(q[row : row + T], keys[slot], values[slot], start))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query of each decoding sequence, (D, H, E), over its own past; returns (D, C)."""
    D, H, E = q.shape
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # (D*H, length, E)
    scores = torch.bmm(q.reshape(D * H, 1, E), keys.transpose(1, 2)).view(D, H, -1)
    weights = torch.softmax(scores.add_(mask), dim=-1)
    return torch.bmm(weights.view(D * H, 1, -1), values).view(D, H * E)


def _attend_piece(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """A piece's queries (T, H, E) over the prompt so far, causally; returns (T, C)."""
    T, H, E = q.shape
    stop = start + T
    scores = torch.bmm(q.transpose(0, 1), keys[:, :stop].transpose(1, 2))  # (H, T, stop)
    future = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores[:, :, start:] += future
    weights = torch.softmax(scores, dim=-1)
    return torch.bmm(weights, values[:, :stop]).transpose(0, 1).reshape(T, H * E)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def _norm(module: nn.Module, dtype: torch.dtype) -> _Norm:
    if isinstance(module, nn.Identity):
        return _Norm(None, None, 0.0)
    assert isinstance(module, nn.LayerNorm)
    return _Norm(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)


def _block(block: Block, residual: bool, dtype: torch.dtype, quantize: str) -> _Block:
    return _Block(
        ln_1=_norm(block.ln_1, dtype),
        c_attn=_scaled_attention_input(block.attn, dtype, quantize),
        attn_proj=_product(block.attn.c_proj, dtype, quantize),
        ln_2=_norm(block.ln_2, dtype),
        c_fc=_product(block.mlp.c_fc, dtype, quantize, gelu=True),
        mlp_proj=_product(block.mlp.c_proj, dtype, quantize),
        n_head=block.attn.n_head,
        residual=residual,
    )


def _product(layer: nn.Linear, dtype: torch.dtype, quantize: str, *, gelu: bool = False) -> Product:
    return product(layer.weight.detach(), layer.bias.detach(), dtype, quantize=quantize, gelu=gelu)


def _scaled_attention_input(attention: Attention, dtype: torch.dtype, quantize: str) -> Product:
    """c_attn with the scores' 1 / sqrt(E) in the rows that make q."""
    layer, C = attention.c_attn, attention.c_attn.in_features
    scale = torch.ones(3 * C, 1, device=layer.weight.device)
    scale[:C] = 1.0 / math.sqrt(C // attention.n_head)
    weight, bias = layer.weight.detach() * scale, layer.bias.detach() * scale[:, 0]
    return product(weight, bias, dtype, quantize=quantize)
