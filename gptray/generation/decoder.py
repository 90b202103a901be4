"""A GPT as generation runs it: packed weights, flat steps, a preallocated cache of keys and values.

A step carries tokens of many sequences side by side: one each for those that are decoding, a piece
of the prompt for those that begin. No token is padding. What a sequence gets does not depend on
its neighbours: every product runs over a token's own row. This decoder runs wherever PyTorch does;
`gptray.generation.native_decoder` has a faster one for some processors.

Shapes: N tokens of a step, S slots, D sequences decoding, H heads, E = head width, C = n_embd.
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

# Keys are read up to a multiple of this: sums over them then group in the same way at any length.
LENGTH_STEP = 32
# Prompts are cut at multiples of this, wherever they stand in the queue: same numbers at any load.
PIECE_TOKENS = 128
# What `Network.prompt_tokens` is on a CPU.
PROMPT_TOKENS = 512


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

    def grow(self, tokens: int) -> None:
        """Make room for a sequence of `tokens`, keeping all that all slots hold."""
        self.fit(max(tokens, self.length), self._slots)

    def move(self, source: int, target: int, tokens: int) -> None:
        for keys, values in self.layers:
            keys[target, :, :tokens] = keys[source, :, :tokens]
            values[target, :, :tokens] = values[source, :, :tokens]

    def _view(self, memory: Tensor) -> Tensor:
        shape = (self._slots, self._n_head, self.length, self._head_width)
        return memory[: math.prod(shape)].view(shape)


def _rounded(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


class Decoder:
    """The network in `dtype` for S = `slots` sequences, its weights packed once.

    quantize: "int8" for the weights of all linear layers and of the head.
    """

    prompt_tokens = PROMPT_TOKENS

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        self._packed = PackedGPT(model, dtype, quantize=quantize)
        self._device = self._packed.device
        self._cache = _Cache(model, slots, dtype=dtype, device=self._device)

    @torch.no_grad()
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
        layers = self._cache.layers
        x = self._packed.hidden(ids, place, lambda layer, qkv: plan.attend(qkv, *layers[layer]))
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

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the step's keys and values; attend. qkv (N, 3C), returns (N, C)."""
        D, parts = self._decoding, []
        if D:
            parts.append(self._attend_one(qkv[:D], keys, values))
        row = D
        for piece in self._pieces:
            stop = row + len(piece.tokens)
            parts.append(
                _attend_piece(qkv[row:stop], keys[piece.slot], values[piece.slot], piece.start)
            )
            row = stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_one(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store each decoding sequence's key and value; attend over its past. Returns (D, C)."""
        D, (_, H, _, E) = qkv.size(0), keys.shape
        q, k, v = qkv.view(D, 3, H, E).unbind(1)
        keys[self._slots, :, self._positions] = k
        values[self._slots, :, self._positions] = v
        past, carried = keys[:D].flatten(0, 1), values[:D].flatten(0, 1)  # (D*H, length, E)
        scores = torch.bmm(q.reshape(D * H, 1, E), past.transpose(1, 2)).view(D, H, -1)
        weights = torch.softmax(scores.add_(self._mask), dim=-1)
        return torch.bmm(weights.view(D * H, 1, -1), carried).view(D, H * E)


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
