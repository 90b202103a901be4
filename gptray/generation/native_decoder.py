"""The decoder that runs a step of the network in one call of the C++ library, `gptray.native`.

On some processors it is about twice as fast as PyTorch's in `gptray.generation.decoder`;
`gptray.generation.loading` finds out where.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_void_p

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.generation import sampling
from gptray.generation.adapted_rows import INTO_MLP, LAYERS, PackedAdapter, numbered_layers
from gptray.generation.cache import FIRST_TOKENS, grown
from gptray.generation.choosing import Chosen
from gptray.generation.decoder import Network, StepRows
from gptray.generation.native_weights import DTYPES, Arena, NativeWeights, interleaved, untouched
from gptray.generation.sampling import Drawn, Row, draw
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT
from gptray.native import abi
from gptray.native.abi import INT8_GROUP, LANES, PANEL, RANK_STEP, load_library
from gptray.native.backend import GENERATE_KEY

# Multiplications in a step that pay for one more thread.
THREAD_WORK = 2_000_000


class NativeDecoder(Network):
    """The network for S = `slots` sequences, its weights packed once.

    dtype: fp32 or bf16, of the weights, keys and values; activations are fp32. quantize: how the
    weights of linear layers and head are quantized, see `gptray.model.quantized`. Raises RunFailed
    if the native library cannot be built.
    """

    backend = "native"

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        self._config = config = model.config
        self._library = load_library(key=GENERATE_KEY)
        self._kind = kind = abi.BF16 if dtype == torch.bfloat16 else abi.FP32
        self._arena = Arena()
        weights = NativeWeights(model, dtype, quantize)
        self._model, self._weights = weights.model(), weights
        self._vocab_size = model.valid_vocab_size
        # Widths of the scratch buffers of decode.h's Step: x, branch, attended; wide, words.
        H, K, E, C = config.n_head, config.kv_heads, config.head_width, config.n_embd
        widest = _rounded(max(C, H * E, config.inner), INT8_GROUP)
        self._widths = (C, C, H * E), (max((H + 2 * K) * E, config.inner), widest)
        self._cache = _Cache((config.n_layer, slots, K, config.n_positions, E), kind)
        # Memory for the buffers, and their addresses in a step with `_planned` rows and rank.
        self._scratch, self._addresses = torch.empty(0), list[int]()
        self._planned = 0, 0

    def step(self, rows: StepRows) -> Tensor:
        """See `Network`; every slot keeps its cache, `alone` or not."""
        tokens, positions, slots = rows.tokens, rows.positions, rows.slots
        # The C++ trusts its caller.
        assert min(tokens) >= 0 and max(tokens) < self._vocab_size, tokens
        assert min(positions) >= 0 and max(positions) < self._cache.n_positions, positions
        assert min(slots) >= 0 and max(slots) < self._cache.slots, slots
        columns = [np.array(one, np.int32) for one in (tokens, slots, positions, rows.asked)]
        logits = torch.empty(len(rows.asked), _rounded(self._vocab_size, PANEL))
        own, most_rank = _tables(rows.adapters)
        step = abi.Step(
            *(numbers.ctypes.data for numbers in columns),
            own,
            len(tokens),
            len(logits),
            len(set(slots)) == len(slots),
            most_rank,
            *self._scratch_for(len(tokens), most_rank),
            abi.Float.from_param(logits),
            logits.size(1),
        )
        threads = len(tokens) * self._weights.count // THREAD_WORK + 1
        self._library.decode_step(
            self._model,
            self._cache.fit(max(positions) + 1),
            step,
            min(threads, torch.get_num_threads()),
        )
        return logits

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        return draw(logits, rows, top_candidates, draw_ranked_rows)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return top_candidates(logits, k)

    def move(self, source: int, target: int, tokens: int) -> None:
        self._cache.move(source, target, tokens)

    def pack(self, layers: Mapping[str, LowRank]) -> NativeAdapter:
        return NativeAdapter(layers, self._config, self._kind, self._arena)

    def _scratch_for(self, rows: int, most_rank: int) -> list[int]:
        """The addresses of a step's x, branch, attended, narrow, wide and words."""
        if self._planned != (rows, most_rank):
            before, after = self._widths
            sizes = [rows * numbers for numbers in (*before, most_rank, *after)]
            if self._scratch.numel() < sum(sizes):
                self._scratch = torch.empty(sum(sizes))
            starts = np.cumsum([0, *sizes[:-1]]) * self._scratch.element_size()
            self._addresses = [self._scratch.data_ptr() + int(start) for start in starts]
            self._planned = rows, most_rank
        return self._addresses


class _Cache:
    """The KV cache: each layer's keys and values, (2, slots, K, length, E).

    shape: (n_layer, slots, K, n_positions, E). The length starts at FIRST_TOKENS and doubles as
    sequences grow: the whole context of every slot may be more than a machine's memory.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], kind: int) -> None:
        layers, self.slots, heads, self.n_positions, width = shape
        self._kind, self._length = kind, min(self.n_positions, FIRST_TOKENS)
        whole = layers, 2, self.slots, heads, self._length, width
        self._layers = list(untouched(whole, DTYPES[kind]).unbind())
        self._view = self._make_view()

    def fit(self, tokens: int) -> abi.Cache:
        """The cache as the library reads it, grown to sequences of `tokens`."""
        if tokens > self._length:
            kept, length = self._length, grown(self._length, tokens, self.n_positions)
            # All first: if one cannot be had, the cache stays as it is.
            wider = [
                untouched((*old.shape[:3], length, old.size(4)), old.dtype) for old in self._layers
            ]
            for layer, old in enumerate(self._layers):
                wider[layer][..., :kept, :] = old
                self._layers[layer] = wider[layer]
            self._length = length
            self._view = self._make_view()
        return self._view

    def move(self, source: int, target: int, tokens: int) -> None:
        for layer in self._layers:
            layer[:, target, :, :tokens] = layer[:, source, :, :tokens]

    def _make_view(self) -> abi.Cache:
        keys, values = (
            (c_void_p * len(self._layers))(*(layer[part].data_ptr() for layer in self._layers))
            for part in range(2)
        )
        return abi.Cache(keys, values, self._length, self._kind)


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


class NativeAdapter(PackedAdapter):
    """An adapter in fp32 or bf16 (kind), whose products are summed in fp32.

    rank: the largest of its layers'. table: an `abi.LowRank` for each layer, and an empty one.
    """

    def __init__(
        self, layers: Mapping[str, LowRank], config: ModelConfig, kind: int, arena: Arena
    ) -> None:
        self._kept: list[Tensor] = []
        self._arena = arena
        self._kind, self._is_gated = kind, config.is_gated
        table = [self._packed(*one) for one in enumerate(numbered_layers(layers, config))]
        self.rank = max(one.rank for one in table)
        end = self._packed(len(table), None)
        array = (abi.LowRank * (len(table) + 1))(*table, end)
        self.table = ctypes.cast(array, POINTER(abi.LowRank))

    def _packed(self, number: int, layer: LowRank | None) -> abi.LowRank:
        if layer is None:
            return abi.LowRank(None, None, 0, self._kind, 0)
        a, b = layer.a, layer.b
        if self._is_gated and LAYERS[number % len(LAYERS)] == INTO_MLP:
            b = interleaved(b)
        padding = -len(a) % RANK_STEP
        a = F.pad(a, (0, -a.size(1) % LANES, 0, padding))
        b = F.pad(b, (0, padding, 0, -len(b) % PANEL))
        steps = a.view(-1, RANK_STEP, a.size(1) // LANES, LANES).transpose(1, 2)
        panels = b.view(-1, PANEL, len(a)).transpose(1, 2)
        dtype = DTYPES[self._kind]
        placed = [self._arena.place(one.shape, dtype).copy_(one) for one in (steps, panels)]
        self._kept += placed
        return abi.LowRank(*(one.data_ptr() for one in placed), len(a), self._kind, a.size(1))


def _tables(adapters: Sequence[PackedAdapter | None]) -> tuple[object, int]:
    """Each row's adapter as the library reads it, or None if no row has one; the largest rank."""
    found, most = (POINTER(abi.LowRank) * len(adapters))(), 0
    for row, adapter in enumerate(adapters):
        if adapter is not None:
            assert isinstance(adapter, NativeAdapter)
            found[row] = adapter.table
            most = max(most, adapter.rank)
    return (found if most else None), most


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`gptray.generation.choosing.top_candidates` for fp32 logits, faster."""
    B, V = logits.shape
    k = min(k, V)
    logits = logits.contiguous()
    assert logits.dtype == torch.float32
    values, ids = torch.empty(B, k), torch.empty(B, k, dtype=torch.int64)
    threads = min(B, torch.get_num_threads())
    load_library(key=GENERATE_KEY).top_candidates(logits, B, V, k, values, ids, threads)
    return values, ids


def draw_ranked_rows(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """`gptray.generation.sampling.draw_ranked_rows`, faster if every row has a top_k."""
    if any(row.sampling.top_k is None for row in rows):
        return sampling.draw_ranked_rows(top_candidates, logits, rows)
    B, V = logits.shape
    draws = (abi.Draw * B)(*map(_draw, rows))
    k = min(max(draw.top_k for draw in draws), V)
    best, tokens = torch.empty(B), torch.empty(B, dtype=torch.int64)
    ids, logs = torch.empty(B, k, dtype=torch.int64), torch.empty(B, k, dtype=torch.float64)
    library, threads = load_library(key=GENERATE_KEY), min(B, torch.get_num_threads())
    library.rank_rows(logits.contiguous(), B, V, k, draws, best, ids, logs, threads)
    library.draw_rows(logs.exp_(), ids, B, k, draws, tokens)
    return tokens, best


def _draw(row: Row) -> abi.Draw:
    asked = row.sampling
    top_p = 1.0 if asked.top_p is None else asked.top_p
    reals = asked.temperature, top_p, asked.min_p or 0.0
    return abi.Draw(*reals, asked.seed, row.sample, row.new_tokens, asked.top_k)
