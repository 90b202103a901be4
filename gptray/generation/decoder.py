"""A GPT as generation runs it: packed weights, flat steps, a preallocated cache of keys and values.

A step carries tokens of many sequences side by side: one each for those that are decoding, a piece
of the prompt for those that begin. No token is padding. What a sequence gets does not depend on
its neighbours: every product runs over a token's own row. This decoder runs wherever PyTorch does;
`gptray.generation.native_decoder` has a faster one for some processors.

Shapes: N tokens of a step, S slots, D sequences decoding, H heads in K groups that share keys and
values, E = head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptray.generation.choosing import top_candidates
from gptray.generation.packed import PackedGPT
from gptray.generation.sampling import Drawn, Row, draw
from gptray.model.gpt import GPT
from gptray.model.precision import own_fp32

# Keys are read up to a multiple of this: sums over them then group in the same way at any length.
LENGTH_STEP = 32
# Prompts are cut at multiples of this, wherever they stand in the queue: same numbers at any load.
PIECE_TOKENS = 128
# What `Network.prompt_tokens` is on a CPU.
PROMPT_TOKENS = 512
# Of each sequence, for which a cache takes memory at once.
FIRST_TOKENS = 1024


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: its tokens stand at `start` and on, in the cache's `slot`.

    scored: the logits after each of its tokens are asked for, not only after the last.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    scored: bool = False

    @property
    def logits(self) -> int:
        """How many rows of logits are asked for."""
        return len(self.tokens) if self.scored else 1


class Network(Protocol):
    """What an engine needs of a decoder: the network, and memory for S sequences in slots."""

    # A step begins no further piece after so many tokens of prompts, so that decoding never stalls.
    prompt_tokens: int

    def step(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        *,
        alone: bool = False,
    ) -> Tensor:
        """Logits, fp32, after each decoding token and what each piece asks for, in this order.

        (D + the pieces' `logits`, V), valid until the next step; V is the vocabulary, padded with
        -inf. decoding: (token, position) of slots 0 .. D - 1. The step's keys and values are kept,
        and what lower slots hold; alone: what all other slots hold.
        """

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        """See `gptray.generation.sampling.draw`."""

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `gptray.generation.sampling.top_candidates`."""

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy what is kept of the first `tokens` positions of one slot over another's."""


class _Cache:
    """Keys and values of every layer for S sequences of up to P tokens, in memory taken once.

    Products are several times faster over keys that lie side by side than over slices of longer
    rows. So each layer's memory is seen as (S, K, length, E) with the least `length` that holds
    the longest sequence, and is laid out anew when that changes: once in LENGTH_STEP tokens. The
    memory holds FIRST_TOKENS a sequence, and twice as many when that is too little.
    """

    def __init__(self, model: GPT, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self._shape = slots, config.kv_heads, config.head_width
        self._most = _rounded(config.n_positions)
        self._room = min(self._most, FIRST_TOKENS)
        self._memory = [
            tuple(torch.zeros(self._numbers(), dtype=dtype, device=device) for _ in range(2))
            for _ in range(config.n_layer)
        ]
        self.length = LENGTH_STEP
        self.layers = [self._views(memory) for memory in self._memory]

    def _numbers(self) -> int:
        return math.prod(self._shape) * self._room

    def fit(self, tokens: int, used: int) -> None:
        """Make room for sequences of `tokens`, keeping what slots 0 .. used - 1 hold."""
        length = _rounded(tokens)
        # A sequence that ends often makes way for one as long: do not shrink for a little.
        if self.length // 2 < length <= self.length:
            return
        kept = min(length, self.length)
        self.length = length
        while self._room < length:
            self._room = min(2 * self._room, self._most)
        for layer, (old_k, old_v) in enumerate(self.layers):
            old = old_k[:used, :, :kept].clone(), old_v[:used, :, :kept].clone()
            if self._memory[layer][0].numel() < self._numbers():
                self._memory[layer] = tuple(old_k.new_zeros(self._numbers()) for _ in range(2))
            keys, values = self.layers[layer] = self._views(self._memory[layer])
            keys[:used, :, :kept], values[:used, :, :kept] = old

    def grow(self, tokens: int) -> None:
        """Make room for a sequence of `tokens`, keeping all that all slots hold."""
        self.fit(max(tokens, self.length), self._shape[0])

    def move(self, source: int, target: int, tokens: int) -> None:
        for keys, values in self.layers:
            keys[target, :, :tokens] = keys[source, :, :tokens]
            values[target, :, :tokens] = values[source, :, :tokens]

    def _views(self, memory: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        slots, heads, width = self._shape
        shape = slots, heads, self.length, width
        keys, values = (one[: math.prod(shape)].view(shape) for one in memory)
        return keys, values


def _rounded(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


class Decoder:
    """The network in `dtype` for S = `slots` sequences, its weights packed once.

    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head.
    """

    prompt_tokens = PROMPT_TOKENS

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        self._packed = PackedGPT(model, dtype, quantize=quantize)
        self._device = self._packed.device
        self._cache = _Cache(model, slots, dtype=dtype, device=self._device)
        self._heads = model.config.n_head + 2 * model.config.kv_heads
        self._windows = [model.config.window(layer) for layer in range(model.config.n_layer)]

    @torch.no_grad()
    @own_fp32()
    def step(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        *,
        alone: bool = False,
    ) -> Tensor:
        """See `Network`."""
        tokens = [token for token, _ in decoding]
        positions = [position for _, position in decoding]
        asked = list(range(len(tokens)))
        for piece in pieces:
            tokens += piece.tokens
            positions += range(piece.start, piece.start + len(piece.tokens))
            asked += range(len(tokens) - piece.logits, len(tokens))
        ids, place = (torch.tensor(numbers, device=self._device) for numbers in (tokens, positions))
        if alone:
            self._cache.grow(max(positions) + 1)
        else:
            self._cache.fit(max(positions) + 1, len(decoding) + len(pieces))
        plan = _AttentionPlan(
            positions[: len(decoding)], pieces, self._cache.length, self._packed.dtype, self._device
        )

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads = qkv.view(len(qkv), self._heads, -1)
            return plan.attend(heads, *self._cache.layers[layer], self._windows[layer])

        x = self._packed.hidden(ids, place, attend)
        return self._packed.logits(x if len(asked) == len(x) else x[asked])

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        """See `Network`."""
        return draw(logits, rows)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Network`."""
        return top_candidates(logits, k)

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `Network`."""
        self._cache.move(source, target, tokens)


class _AttentionPlan:
    """What attention of a step needs in every layer, made once: places, masks, pieces."""

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
        self._places = torch.arange(length, device=device)
        self._dtype = dtype
        self._masks: dict[int | None, Tensor] = {}
        self._pieces = pieces

    def attend(self, heads: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Store the step's keys and values; attend, back over `window` tokens.

        heads: q, k, v (N, H + 2 K, E); keys and values (S, K, length, E). Returns (N, H E).
        """
        D, parts, K = self._decoding, [], keys.size(1)
        q, k, v = torch.split(heads, [heads.size(1) - 2 * K, K, K], dim=1)
        q = q.reshape(len(q), K, -1, q.size(2))  # (N, K, H / K, E)
        if D:
            parts.append(self._attend_one(q[:D], k[:D], v[:D], keys, values, window))
        row = D
        for piece in self._pieces:
            rows = slice(row, row + len(piece.tokens))
            kept = keys[piece.slot], values[piece.slot]
            parts.append(_attend_piece(q[rows], k[rows], v[rows], *kept, piece.start, window))
            row = rows.stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_one(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        """Store each decoding sequence's key and value; attend over its past. Returns (D, H E)."""
        D, K, G, E = q.shape
        keys[self._slots, :, self._positions] = k
        values[self._slots, :, self._positions] = v
        past, carried = keys[:D].flatten(0, 1), values[:D].flatten(0, 1)  # (D*K, length, E)
        scores = torch.bmm(q.reshape(D * K, G, E), past.transpose(1, 2)).view(D, K * G, -1)
        weights = torch.softmax(scores.add_(self._mask(window)), dim=-1)
        return torch.bmm(weights.view(D * K, G, -1), carried).view(D, K * G * E)

    def _mask(self, window: int | None) -> Tensor:
        """-inf for what a decoding sequence does not see, (D, 1, length)."""
        if window not in self._masks:
            own = self._positions[:, None]
            hidden = self._places > own
            if window is not None:
                hidden |= self._places <= own - window
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=own.device)
            self._masks[window] = mask.masked_fill_(hidden, float("-inf")).unsqueeze_(1)
        return self._masks[window]


def _attend_piece(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None
) -> Tensor:
    """Store a piece's keys and values, (K, length, E); attend causally. Returns (T, H E)."""
    T, K, G, E = q.shape
    stop = start + T
    keys[:, start:stop] = k.transpose(0, 1)
    values[:, start:stop] = v.transpose(0, 1)
    q = q.permute(1, 2, 0, 3).reshape(K, G * T, E)
    scores = torch.bmm(q, keys[:, :stop].transpose(1, 2)).view(K, G, T, stop)
    none = torch.full((T, stop), float("-inf"), dtype=q.dtype, device=q.device)
    scores[..., start:] += none[:, start:].triu(1)
    if window is not None:
        scores += none.tril(start - window)
    weights = torch.softmax(scores, dim=-1).view(K, G * T, stop)
    attended = torch.bmm(weights, values[:, :stop]).view(K, G, T, E)
    return attended.permute(2, 0, 1, 3).reshape(T, K * G * E)
