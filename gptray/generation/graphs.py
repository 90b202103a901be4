"""The decoder for GPUs: each part of a step is one CUDA graph over a fixed number of rows.

A step first reads prompts, all but each piece's last token, in some passes; then it takes one token
of every sequence through the network. Each kind of pass always runs over the same number of rows,
most of them padding at times: so a row's numbers are the same whatever else the step holds. The
sampler leaves its tokens where the pass that decodes reads them. So where a batch has not changed
since the step before, its next step begins while the host takes the tokens in; if the host then
asks for another, that work is dropped.

Shapes: S slots, N rows of a pass, K heads of keys and values, E = head width, P positions that the
cache has room for, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from gptray.generation import gpu_kernels
from gptray.generation.adapted_rows import PackedAdapter, run_plain
from gptray.generation.cache import FIRST_TOKENS, grown
from gptray.generation.decoder import Network, Piece, StepRows
from gptray.generation.gpu_adapters import GpuAdaptedRows, GpuAdapter, addresses
from gptray.generation.gpu_kernels import CHUNK_KEYS, TILE_ROWS
from gptray.generation.graph_sampler import GraphSampler, check_random_numbers, token_of
from gptray.generation.packed import PackedGPT
from gptray.generation.queries import Queries
from gptray.generation.recording import Graphs, Mirror
from gptray.generation.sampling import Drawn, Row
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT
from gptray.model.rotary import Angles

# Rows of the pass that reads prompts, and how many a step begins.
PROMPT_ROWS, PROMPT_PASSES = 1024, 8
# Tokens that are tried when a decoder opens, and the relative error of their logits that rounding
# to 16 bits in many layers may make.
TRIED_TOKENS, TRIED_ERROR = 100, 0.05
# The largest rank of adapters for which there is room at first.
FIRST_RANK = 256


class GraphDecoder(Network):
    """The network in `dtype` for S = `slots` sequences, on the model's device.

    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head.
    takes_adapters: rows may have adapters from `pack`; where some do, other graphs run.
    Memory: keys and values take 2 x n_layer x (S + 1) x K x P x E numbers of `dtype`. P is at first
    FIRST_TOKENS, and twice as many when that is too little; then all graphs are recorded anew, as
    they are for an adapter of a larger rank than FIRST_RANK.
    """

    backend = "graph"
    piece_tokens = PROMPT_ROWS
    prompt_tokens = PROMPT_PASSES * PROMPT_ROWS

    def __init__(
        self,
        model: GPT,
        slots: int,
        *,
        dtype: torch.dtype,
        quantize: str = "none",
        takes_adapters: bool = False,
    ) -> None:
        self._config = config = model.config
        self._network = PackedGPT(model, dtype, rows=slots, quantize=quantize, fused=True)
        self._device = device = self._network.device
        self._most, self._room = config.n_positions, min(config.n_positions, FIRST_TOKENS)
        shape = (slots + 1, config.kv_heads, self._room, config.head_width)
        self._caches = [
            torch.zeros(2, *shape, dtype=dtype, device=device) for _ in range(config.n_layer)
        ]
        self._windows = [config.window(layer) for layer in range(config.n_layer)]
        # One pass more for the last piece that a step begins. The last slot is for padding.
        self._reading = _Rows(PROMPT_ROWS, slots, device, passes=PROMPT_PASSES + 1, is_tiled=True)
        self._decoding = _Rows(slots, slots, device)
        self._positions: list[int] = []  # of the step's rows
        self._is_steady = False  # whether the step after may begin by what is drawn
        self._begun = False  # whether it has begun
        self._ahead: tuple[list[int], list[int]] | None = None  # its tokens and positions
        self._takes_adapters, self._ranks = takes_adapters, FIRST_RANK
        if gpu_kernels.kernels_for(self._caches[0]):
            check_random_numbers(device)
            self._check(None)
            if takes_adapters:
                self._check(GpuAdapter.tried(model, dtype, device))
        self._record()

    @torch.no_grad()
    def _check(self, adapter: GpuAdapter | None) -> None:
        """Raise RuntimeError where kernels give other logits than their formulas on this GPU."""
        count = min(TRIED_TOKENS, self._most - 1)
        # Around the place where the second chunk of keys begins; what is before them is zeros.
        start = max(0, min(CHUNK_KEYS - count // 2, self._most - 1 - count))
        tokens = [number % self._network.vocab_size for number in range(count)]
        prompt = StepRows([], [Piece(0, start, tokens, adapter=adapter)])
        after = StepRows([(0, start + count)], [], [adapter])
        hidden = partial(self._hidden, adapted=adapter is not None)

        def computed() -> Tensor:
            parts = [hidden(self._reading)[:count] for _ in self._reading.passes(prompt)]
            parts += [hidden(self._decoding)[:1] for _ in self._decoding.passes(after)]
            return self._network.logits(torch.cat(parts))[:, : self._network.vocab_size].float()

        found = computed()
        with gpu_kernels.formulas():
            expected = computed()
        self._reading.clear()
        self._decoding.clear()
        if (found - expected).norm() > TRIED_ERROR * expected.norm():
            raise RuntimeError("the kernels give other numbers than PyTorch on this GPU")

    def _record(self) -> None:
        graphs = Graphs(self._device)

        def decoded(*, adapted: bool) -> Tensor:
            return self._network.logits(self._hidden(self._decoding, adapted=adapted))

        # By whether rows have adapters. The sampler always reads logits from the same memory.
        self._read = {False: graphs.recorded(lambda: self._hidden(self._reading))}
        self._decode = {False: graphs.recorded(lambda: decoded(adapted=False))}
        self._read[False]()
        self._logits = logits = self._decode[False]()
        if self._takes_adapters:
            self._read[True] = graphs.recorded(lambda: self._hidden(self._reading, adapted=True))
            self._decode[True] = graphs.recorded(lambda: logits.copy_(decoded(adapted=True)))
        self._sampler = GraphSampler(self._logits, self._decoding.columns[0], graphs)

    @torch.no_grad()
    def step(self, rows: StepRows) -> Tensor:
        """See `Network`; slots never disturb each other here."""
        tokens, adapters = max(rows.positions) + 1, [one for one in rows.adapters if one]
        ranks = max((one.rank for one in adapters if isinstance(one, GpuAdapter)), default=0)
        if tokens > self._room or ranks > self._ranks:
            self._grow(tokens, ranks)
        decoding, pieces = rows.decoding, rows.pieces
        read = StepRows([], [replace(piece, tokens=piece.tokens[:-1]) for piece in pieces])
        if pieces:
            own = rows.adapters[: len(decoding)]
            rows = StepRows(decoding, [_last(piece) for piece in pieces], own)
        ahead, self._ahead = self._ahead, None
        self._adapted = bool(adapters)
        run, decode = self._read[self._adapted], self._decode[self._adapted]
        is_scored = any(piece.scored for piece in pieces)
        passes = self._reading.passes(read)
        hidden = [run().clone() if is_scored else run() for _ in passes]
        if pieces or ahead != (rows.tokens, rows.positions):
            for _ in self._decoding.passes(rows):
                self._logits = decode()
        is_same_batch = not pieces and len(rows.positions) == len(self._positions)
        self._is_steady = is_same_batch and tokens < self._room
        self._positions = rows.positions
        logits = self._logits[: len(rows.tokens)]
        if not is_scored:
            return logits
        # Of a scored piece also the logits after the tokens before its last.
        logits = logits.float()
        states = torch.cat(hidden) if hidden else logits  # of one token each, none has any
        parts, start = [logits[: len(decoding)]], 0
        for row, piece in enumerate(pieces, start=len(decoding)):
            count = len(piece.tokens) - 1
            if piece.scored and count:
                parts.append(self._network.logits(states[start : start + count]).float())
            parts.append(logits[row : row + 1])
            start += count
        return torch.cat(parts)

    def pack(self, layers: Mapping[str, LowRank]) -> PackedAdapter:
        assert self._takes_adapters
        return GpuAdapter(layers, self._config, self._network.dtype, self._device)

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        self._begun = False
        drawn = self._sampler.draw(logits, rows, self._begin_next if self._is_steady else None)
        if self._begun:
            tokens = [one.token if one else -1 for one in drawn]
            self._ahead = tokens, [position + 1 for position in self._positions]
        return drawn

    def move(self, source: int, target: int, tokens: int) -> None:
        for cache in self._caches:
            cache[:, target, :, :tokens] = cache[:, source, :, :tokens]

    def _grow(self, tokens: int, ranks: int) -> None:
        """Make room for sequences of `tokens` and adapters of rank `ranks`.

        Raises OutOfMemoryError where there is no memory, and goes on as before.
        """
        del self._read, self._decode, self._logits, self._sampler  # and so the graphs' memory
        self._ahead = None
        room = grown(self._room, tokens, self._most)
        self._ranks = max(self._ranks, ranks)
        try:
            for layer, old in enumerate(self._caches):
                self._caches[layer] = old.new_zeros(*old.shape[:3], room, old.size(4))
                self._caches[layer][..., : old.size(3), :] = old
            self._room = room
        finally:
            # Where memory ended, the layers that have grown give back what they took.
            for layer, cache in enumerate(self._caches):
                self._caches[layer] = cache[..., : self._room, :].contiguous()
            self._reading.clear()
            self._decoding.clear()
            self._record()

    def _begin_next(self) -> None:
        """Run the step in which all rows go on by what is drawn."""
        self._decoding.columns[1].add_(1).clamp_(max=self._room - 1)  # padding's grow as well
        self._logits = self._decode[self._adapted]()
        self._begun = True

    def _hidden(self, rows: _Rows, *, adapted: bool = False) -> Tensor:
        codes, positions, slots, adapters = rows.columns
        run = GpuAdaptedRows(adapters, slots, rows.tiles, self._ranks).run if adapted else run_plain

        def attend(layer: int, qkv: Tensor, queries: Queries, angles: Angles | None) -> Tensor:
            return gpu_kernels.attend(
                *(qkv, queries, angles, *self._caches[layer], slots, positions),
                window=self._windows[layer],
                tiles=rows.tiles,
            )

        return self._network.hidden(token_of(codes), positions, attend, run)


def _last(piece: Piece) -> Piece:
    """The part of a piece that has its last token alone."""
    return replace(piece, start=piece.start + len(piece.tokens) - 1, tokens=piece.tokens[-1:])


class _Rows:
    """The tokens, positions, slots and addresses of adapters that a pass reads, (4, N).

    Padding is in slot `spare`.

    tiles: see `attend`; None unless `is_tiled`.
    """

    def __init__(
        self,
        count: int,
        spare: int,
        device: torch.device,
        *,
        passes: int = 1,
        is_tiled: bool = False,
    ) -> None:
        fields = 5 if is_tiled else 4
        self._mirror, self._spare = Mirror(fields, count, device, pages=passes), spare
        self.columns = self._mirror.sent[:4]
        # Each of the pass's pieces has at most one tile that is not full.
        most = min(count, count // TILE_ROWS + spare)
        self.tiles = self._mirror.sent[4, :most] if is_tiled else None
        self.clear()

    def clear(self) -> None:
        """Have the next pass read padding alone."""
        self._mirror.wait()
        numbers = self._mirror.numbers[0]
        numbers[:4] = [[0], [0], [self._spare], [0]]
        numbers[4:] = numbers.shape[1]
        self._mirror.send()

    def passes(self, rows: StepRows) -> Iterator[None]:
        """Have each of the next passes read its part of these rows; the rest is padding."""
        N, count = len(rows.tokens), self.columns.size(1)
        self._mirror.wait()
        for page, start in enumerate(range(0, N, count)):
            numbers, part = self._mirror.numbers[page], slice(start, start + count)
            columns = rows.tokens[part], rows.positions[part], rows.slots[part]
            filled = len(columns[0])
            numbers[:4, filled:] = [[0], [0], [self._spare], [0]]
            numbers[:4, :filled] = *columns, addresses(rows.adapters[part])
            if self.tiles is not None:
                tiles = _tiles(columns[2])
                numbers[4] = count
                numbers[4, : len(tiles)] = tiles
            self._mirror.send(page)
            yield


def _tiles(slots: Sequence[int]) -> list[int]:
    """The first rows of tiles for rows in these slots, those of a slot side by side."""
    starts, row = list[int](), 0
    for _, group in groupby(slots):
        stop = row + sum(1 for _ in group)
        starts += range(row, stop, TILE_ROWS)
        row = stop
    return starts
