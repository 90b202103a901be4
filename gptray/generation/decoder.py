"""What a decoder does for the engine, and the decoder that runs wherever PyTorch does.

A step of the network carries tokens of many sequences without padding: one token of each sequence
that decodes, and a piece of each prompt in prefill. A sequence's result does not depend on its
neighbours in the batch, as every product runs over a token's own row. Faster decoders for some
hardware: `gptray.generation.native_decoder`, `gptray.generation.graphs`.

Shapes: N tokens of a step, S slots, D decoding sequences, H query heads, K heads of keys and
values, E = head width, T tokens of a piece, V padded vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gptray.generation.adapted_rows import AdaptedRows, PackedAdapter, TorchAdapter
from gptray.generation.cache import Cache
from gptray.generation.choosing import top_candidates
from gptray.generation.packed import PackedGPT
from gptray.generation.queries import Queries
from gptray.generation.sampling import Drawn, Row, draw
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT
from gptray.model.precision import own_fp32
from gptray.model.rotary import Angles

# `Network.piece_tokens` and `Network.prompt_tokens` on a CPU.
PIECE_TOKENS, PROMPT_TOKENS = 128, 512


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a prompt, from position `start` on, for a slot of the KV cache.

    scored: return the logits after every token, not only after the last. adapter: the sequence's.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    scored: bool = False
    adapter: PackedAdapter | None = None

    @property
    def logits(self) -> int:
        """How many rows of logits the piece returns."""
        return len(self.tokens) if self.scored else 1

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


class StepRows:
    """What a step reads: N tokens, a row each, the decoding sequences' first, then the pieces'.

    decoding: the newest (token, position) in slots 0 .. D - 1. adapters: one from `Network.pack`,
    or None, for each of them; empty if none has any. alone: keep what all other slots hold; without
    it, the cache keeps only this step's slots and those below them. asked: the rows whose logits
    are returned.
    """

    def __init__(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        adapters: Sequence[PackedAdapter | None] = (),
        *,
        alone: bool = False,
    ) -> None:
        self.decoding, self.pieces, self.alone = decoding, pieces, alone
        self.tokens = [token for token, _ in decoding]
        self.positions = [position for _, position in decoding]
        self.slots = list(range(len(decoding)))
        self.adapters = list(adapters) or [None] * len(decoding)
        assert len(self.adapters) == len(decoding), adapters
        self.asked = self.slots.copy()
        for piece in pieces:
            count = len(piece.tokens)
            self.tokens += piece.tokens
            self.positions += range(piece.start, piece.start + count)
            self.slots += [piece.slot] * count
            self.adapters += [piece.adapter] * count
            self.asked += range(len(self.tokens) - piece.logits, len(self.tokens))


class Network(ABC):
    """A decoder as the engine sees it: the network, and a KV cache of S slots, one per sequence."""

    # Its name in `generate.backend`, or "graph".
    backend: ClassVar[str]
    # Prompts are cut at multiples of this whatever else the step carries, so that a prompt gives
    # the same numbers under any load.
    piece_tokens = PIECE_TOKENS
    # Once a step carries this many prompt tokens, it takes no more pieces: decoding never stalls.
    prompt_tokens = PROMPT_TOKENS

    @abstractmethod
    def step(self, rows: StepRows) -> Tensor:
        """Run the network over rows.

        Returns the logits after each decoding token, then each piece's, (D + the pieces' `logits`,
        V), padded with -inf, valid until the next step; fp32, or the network's dtype if no piece is
        scored.
        """

    @abstractmethod
    def pack(self, layers: Mapping[str, LowRank]) -> PackedAdapter:
        """Pack an adapter for this decoder's steps. For any thread, but one at a time."""

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        """See `gptray.generation.sampling.draw`."""
        return draw(logits, rows, self.top)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `gptray.generation.choosing.top_candidates`."""
        return top_candidates(logits, k)

    @abstractmethod
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the cache of one slot's first `tokens` positions to another slot."""

    def scrub(self, tokens: Sequence[int]) -> None:
        """Clear each slot's cache beyond its first `tokens[slot]` positions, if steps read it."""
        return  # by default they read no further than a sequence goes


class Decoder(Network):
    """The network in `dtype` for S = `slots` sequences, its weights packed once.

    quantize: how the weights of linear layers and head are quantized, see `gptray.model.quantized`.
    """

    backend = "torch"

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        self._config = model.config
        self._packed = PackedGPT(model, dtype, rows=slots, quantize=quantize)
        self._device = self._packed.device
        self._cache = Cache(model, slots, dtype=dtype, device=self._device)
        self._heads = model.config.n_head + 2 * model.config.kv_heads
        self._windows = [model.config.window(layer) for layer in range(model.config.n_layer)]

    @torch.no_grad()
    @own_fp32()
    def step(self, rows: StepRows) -> Tensor:
        tokens, positions = (
            torch.tensor(numbers, device=self._device) for numbers in (rows.tokens, rows.positions)
        )
        length = max(rows.positions) + 1
        if rows.alone:
            self._cache.grow(length)
        else:
            self._cache.fit(length, len(rows.decoding) + len(rows.pieces))
        plan = _AttentionPlan(positions[: len(rows.decoding)], rows.pieces, self._cache)

        def attend(layer: int, qkv: Tensor, queries: Queries, angles: Angles | None) -> Tensor:
            heads = queries(qkv, angles).view(len(qkv), self._heads, -1)
            return plan.attend(layer, heads, self._windows[layer])

        adapted = AdaptedRows(rows.adapters, self._device)
        x = self._packed.hidden(tokens, positions, attend, adapted.run)
        return self._packed.logits(x if len(rows.asked) == len(x) else x[rows.asked]).float()

    def pack(self, layers: Mapping[str, LowRank]) -> TorchAdapter:
        return TorchAdapter(layers, self._config, self._packed.dtype, self._device)

    def move(self, source: int, target: int, tokens: int) -> None:
        self._cache.move(source, target, tokens)

    def scrub(self, tokens: Sequence[int]) -> None:
        self._cache.scrub(tokens)


class _AttentionPlan:
    """A step's attention: what all layers share, such as masks, is computed once."""

    def __init__(self, positions: Tensor, pieces: Sequence[Piece], cache: Cache) -> None:
        """positions: the decoding sequences', (D,)."""
        self._positions, self._pieces, self._cache = positions, pieces, cache
        self._slots = torch.arange(len(positions), device=positions.device)
        self._places = torch.arange(cache.length, device=positions.device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, heads: Tensor, window: int | None) -> Tensor:
        """Store the step's keys and values, then attend to the last `window` tokens (None: all).

        heads: q, k, v (N, H + 2 K, E). Returns (N, H E).
        """
        keys, values = self._cache.layers[layer]  # (S, K, length, E)
        D, parts, K = len(self._positions), [], keys.size(1)
        q, k, v = torch.split(heads, [heads.size(1) - 2 * K, K, K], dim=1)
        q = q.reshape(len(q), K, -1, q.size(2))  # (N, K, H / K, E)
        if D:
            parts.append(self._attend_decoding(q[:D], k[:D], v[:D], keys, values, window))
        row = D
        for piece in self._pieces:
            rows = slice(row, row + len(piece.tokens))
            cache = keys[piece.slot], values[piece.slot]
            parts.append(_attend_piece(q[rows], k[rows], v[rows], *cache, piece.start, window))
            row = rows.stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_decoding(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        """Store each decoding sequence's key and value; attend to its past. Returns (D, H E)."""
        D, K, G, E = q.shape
        keys[self._slots, :, self._positions] = k
        values[self._slots, :, self._positions] = v
        keys, values = keys[:D].flatten(0, 1), values[:D].flatten(0, 1)  # (D*K, length, E)
        scores = torch.bmm(q.reshape(D * K, G, E), keys.transpose(1, 2)).view(D, K * G, -1)
        weights = torch.softmax(scores.add_(self._mask(window, scores.dtype)), dim=-1)
        return torch.bmm(weights.view(D * K, G, -1), values).view(D, K * G * E)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """-inf at positions that a decoding sequence must not see, else 0, (D, 1, length)."""
        if window not in self._masks:
            own = self._positions[:, None]
            hidden = self._places > own
            if window is not None:
                hidden |= self._places <= own - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=own.device)
            self._masks[window] = mask.masked_fill_(hidden, float("-inf")).unsqueeze_(1)
        return self._masks[window]


def _attend_piece(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None
) -> Tensor:
    """Store a piece's keys and values in its slot's, (K, length, E), then attend causally.

    q (T, K, H / K, E), k and v (T, K, E). Returns (T, H E).
    """
    T, K, G, E = q.shape
    stop = start + T
    keys[:, start:stop] = k.transpose(0, 1)
    values[:, start:stop] = v.transpose(0, 1)
    q = q.permute(1, 2, 0, 3).reshape(K, G * T, E)
    scores = torch.bmm(q, keys[:, :stop].transpose(1, 2)).view(K, G, T, stop)
    hidden = torch.full((T, stop), float("-inf"), dtype=q.dtype, device=q.device)
    scores[..., start:] += hidden[:, start:].triu(1)
    if window is not None:
        scores += hidden.tril(start - window)
    weights = torch.softmax(scores, dim=-1).view(K, G * T, stop)
    attended = torch.bmm(weights, values[:, :stop]).view(K, G, T, E)
    return attended.permute(2, 0, 1, 3).reshape(T, K * G * E)
