"""A GPT as generation runs it: packed weights, flat steps, a preallocated cache of keys and values.

A step carries tokens of many sequences side by side: one each for those that are decoding, a piece
of the prompt for those that begin. No token is padding. What a sequence gets does not depend on
its neighbours: every product runs over a token's own row.

Shapes: N tokens of a step, S slots, D sequences decoding, H heads, E = head width, C = n_embd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.generation.products import Product, product
from gptray.generation.sampling import CHUNK
from gptray.model.gpt import GPT, Attention, Block

# Keys are read up to a multiple of this: sums over them then group in the same way at any length.
LENGTH_STEP = 32


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

    quantize: "int8" for the weights of all linear layers and of the head. compile: have the code
    between the products fused, once for all layers and for any number of rows (`warm_up`).
    """

    def __init__(
        self, model: GPT, *, dtype: torch.dtype, quantize: str = "none", compile: bool = False
    ) -> None:
        self.dtype = dtype
        self.valid_vocab_size = model.valid_vocab_size
        transformer = model.transformer
        self.device = transformer.wte.weight.device
        self._wte, self._wpe = transformer.wte.weight.detach(), transformer.wpe.weight.detach()
        self._blocks = [
            _block(cast(Block, block), model.config.residual, dtype, quantize)
            for block in transformer.h
        ]
        # A whole number of the sampler's chunks, so that it need not copy the logits.
        head = self._wte[: self.valid_vocab_size]
        self._head = _Head(
            _norm(transformer.ln_f, dtype),
            product(F.pad(head, (0, 0, 0, -head.size(0) % CHUNK)), None, dtype, quantize=quantize),
        )
        self._code = _compiled() if compile else _PLAIN

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
        wanted = len(last)
        if self._code.min_rows > wanted:
            tokens, positions, last = [*tokens, 0], [*positions, 0], [*last, *last]
        place = torch.tensor(positions, device=self.device)
        ids = torch.tensor(tokens, device=self.device)
        x = (F.embedding(ids, self._wte) + F.embedding(place, self._wpe)).to(self.dtype)
        cache.fit(max(positions) + 1, len(decoding) + len(pieces))
        plan = _AttentionPlan(
            positions[: len(decoding)], pieces, cache.length, self.dtype, self.device
        )
        code, blocks = self._code, self._blocks
        qkv = code.enter(x, blocks[0])
        for block, following, layer in zip(blocks, blocks[1:], cache.layers, strict=False):
            x, qkv = code.cross(plan.attend(qkv, *layer, code.attend_one), x, block, following)
        attended = plan.attend(qkv, *cache.layers[-1], code.attend_one)
        if pieces:
            attended, x = attended[last], x[last]
        logits = code.leave(attended, x, blocks[-1], self._head)[:wanted]
        logits[:, self.valid_vocab_size :] = float("-inf")
        return logits

    @torch.no_grad()
    def warm_up(self, cache: Cache) -> None:
        """Have everything compiled that steps over this cache will run; seconds, once.

        Sizes that steps differ in are named as such: no later step compiles anything.
        """
        code, blocks = self._code, self._blocks
        slots, _, length, _ = cache.layers[0][0].shape
        x = torch.zeros(max(slots, 2), self._wpe.size(1), dtype=self.dtype, device=self.device)
        qkv = code.enter(x, blocks[0])
        for D in {slots, 1}:
            plan = _AttentionPlan([0] * D, (), length, self.dtype, self.device)
            plan.attend(qkv[:D], *cache.layers[0], code.attend_one)
        if len(blocks) > 1:
            code.cross(x.clone(), x, blocks[0], blocks[1])
        code.leave(x.clone(), x, blocks[-1], self._head)


class _AttentionPlan:
    """What attention of a step needs in every layer, made once: places, mask, pieces."""

    def __init__(
        self,
        positions: Sequence[int],
        pieces: Sequence[Piece],
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._decoding = len(positions)
        self._slots = torch.arange(self._decoding, device=device)
        self._positions = torch.tensor(positions, dtype=torch.int64, device=device)
        beyond = torch.arange(length, device=device) > self._positions[:, None]
        self._mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
        self._mask.masked_fill_(beyond, float("-inf")).unsqueeze_(1)  # (D, 1, length)
        self._pieces = pieces

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, attend_one: _AttendOne) -> Tensor:
        """Store the step's keys and values; attend. qkv (N, 3C), returns (N, C)."""
        D, parts = self._decoding, []
        if D:
            parts.append(
                attend_one(qkv[:D], keys, values, self._slots, self._positions, self._mask)
            )
        row = D
        for piece in self._pieces:
            stop = row + len(piece.tokens)
            parts.append(
                _attend_piece(qkv[row:stop], keys[piece.slot], values[piece.slot], piece.start)
            )
            row = stop
        if row < qkv.size(0):
            parts.append(qkv.new_zeros(qkv.size(0) - row, qkv.size(1) // 3))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Block:
    ln_1: _Norm
    c_attn: Product
    attn_proj: Product
    ln_2: _Norm
    c_fc: Product
    mlp_proj: Product
    residual: bool


@dataclass(frozen=True)
class _Head:
    ln_f: _Norm
    product: Product


def _enter(x: Tensor, block: _Block) -> Tensor:
    """x (N, C) -> queries, keys and values (N, 3C)."""
    return block.c_attn(block.ln_1(x))


def _after_attention(attended: Tensor, x: Tensor, block: _Block) -> Tensor:
    x = block.attn_proj(attended, x if block.residual else None)
    return block.mlp_proj(block.c_fc(block.ln_2(x)), x if block.residual else None)


def _cross(attended: Tensor, x: Tensor, block: _Block, following: _Block) -> tuple[Tensor, Tensor]:
    """From one block's attention to the next one's: its x (N, C) and qkv (N, 3C)."""
    x = _after_attention(attended, x, block)
    return x, _enter(x, following)


def _leave(attended: Tensor, x: Tensor, block: _Block, head: _Head) -> Tensor:
    """From the last attention to logits (N, V)."""
    return head.product(head.ln_f(_after_attention(attended, x, block)))


def _attend_one(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """Store each decoding sequence's key and value; attend over its past. Returns (D, C)."""
    D, (_, H, _, E) = qkv.size(0), keys.shape
    q, k, v = qkv.view(D, 3, H, E).unbind(1)
    keys[slots, :, positions] = k
    values[slots, :, positions] = v
    past, carried = keys[:D].flatten(0, 1), values[:D].flatten(0, 1)  # (D*H, length, E)
    scores = torch.bmm(q.reshape(D * H, 1, E), past.transpose(1, 2)).view(D, H, -1)
    weights = torch.softmax(scores.add_(mask), dim=-1)
    return torch.bmm(weights.view(D * H, 1, -1), carried).view(D, H * E)


_AttendOne = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Code:
    """What a step runs between its products, plain or compiled, over `min_rows` rows or more."""

    enter: Callable[[Tensor, _Block], Tensor] = _enter
    attend_one: _AttendOne = _attend_one
    cross: Callable[[Tensor, Tensor, _Block, _Block], tuple[Tensor, Tensor]] = _cross
    leave: Callable[[Tensor, Tensor, _Block, _Head], Tensor] = _leave
    min_rows: int = 1


_PLAIN = _Code()


def _compiled() -> _Code:
    """Each function compiled by its first call, the sizes that vary named."""
    return _Code(
        enter=_Compiled(_enter, [0]),
        attend_one=_Compiled(_attend_one, [0], [2], [2], [0], [0], [0, 2]),
        cross=_Compiled(_cross, [0], [0]),
        leave=_Compiled(_leave, [0], [0]),
        # Code made for one row alone would sum it in another order.
        min_rows=2,
    )


class _Compiled:
    """A function, compiled, with the dimensions of its first arguments that vary."""

    def __init__(self, function: Callable[..., Any], *varying: Sequence[int]) -> None:
        self._run = torch.compile(function, fullgraph=True)
        self._varying = varying
        self._known: set[bool] = set()

    def __call__(self, *args: Any) -> Any:
        # PyTorch makes code of its own for a size of one.
        is_one = args[0].size(0) == 1
        if is_one not in self._known:
            self._known.add(is_one)
            for tensor, dims in zip(args, self._varying, strict=False):
                for dim in dims:
                    if tensor.size(dim) > 1:
                        torch._dynamo.mark_dynamic(tensor, dim)
        return self._run(*args)


def _attend_piece(qkv: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Store a piece's keys and values, (H, length, E); attend causally. Returns (T, C)."""
    T, (H, _, E) = qkv.size(0), keys.shape
    stop = start + T
    q, k, v = qkv.view(T, 3, H, E).permute(1, 2, 0, 3)  # (H, T, E) each
    keys[:, start:stop] = k
    values[:, start:stop] = v
    scores = torch.bmm(q, keys[:, :stop].transpose(1, 2))  # (H, T, stop)
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
