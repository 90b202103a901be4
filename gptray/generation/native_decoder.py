"""The decoder of `gptray.native`: a step of the network in one call.

Does what `gptray.generation.decoder` does with PyTorch, on some processors about twice as fast:
`gptray.generation.step_timing` finds out where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_void_p

import numpy as np
import torch
from torch import Tensor

from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.cache import FIRST_TOKENS
from gptray.generation.decoder import Network, Piece, StepRows
from gptray.generation.native_adapter import NativeAdapter, tables
from gptray.generation.native_sampling import draw_limited, top_candidates
from gptray.generation.native_weights import DTYPES, NativeWeights, Rooms, room
from gptray.generation.sampling import Drawn, Row, draw
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT
from gptray.native import abi
from gptray.native.abi import INT8_GROUP, PANEL, load_library
from gptray.native.backend import GENERATE_KEY

# Multiplications of a step below which one more thread costs more than it brings.
THREAD_WORK = 2_000_000


class NativeDecoder(Network):
    """The network for S = `slots` sequences, its weights packed once.

    dtype: fp32 or bf16, of the weights, keys and values; what lies between products is fp32.
    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head.

    Raises:
        RunFailed: the native library cannot be built.
    """

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        self._config = config = model.config
        self._library = load_library(key=GENERATE_KEY)
        kept = abi.BF16 if dtype == torch.bfloat16 else abi.FP32
        self._kept, self._rooms = kept, Rooms()
        weights = NativeWeights(model, dtype, quantize)
        self._model, self._weights = weights.model(), weights
        self._vocab_size = model.valid_vocab_size
        # Numbers of a token: x, made, attended; wide, words.
        H, K, E, C = config.n_head, config.kv_heads, config.head_width, config.n_embd
        widest = _rounded(max(C, H * E, config.inner), INT8_GROUP)
        self._widths = (C, C, H * E), (max((H + 2 * K) * E, config.inner), widest)
        self._cache = _Cache((config.n_layer, slots, K, config.n_positions, E), kept)
        # Room for what lies between products, and where a step of `_asked` rows and rank has it.
        self._scratch, self._places = torch.empty(0), list[int]()
        self._asked = 0, 0

    @torch.no_grad()
    def step(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        *,
        adapters: Sequence[PackedAdapter | None] = (),
        alone: bool = False,
    ) -> Tensor:
        """See `Network`; slots never disturb each other here."""
        of_step = StepRows(decoding, pieces, adapters)
        tokens, positions, slots = of_step.tokens, of_step.positions, of_step.slots
        # The C++ trusts its caller.
        assert min(tokens) >= 0 and max(tokens) < self._vocab_size, tokens
        assert min(positions) >= 0 and max(positions) < self._cache.most, positions
        assert min(slots) >= 0 and max(slots) < self._cache.slots, slots
        rows = [
            np.array(numbers, np.int32) for numbers in (tokens, slots, positions, of_step.asked)
        ]
        logits = torch.empty(len(of_step.asked), _rounded(self._vocab_size, PANEL))
        own, most_rank = tables(of_step.adapters)
        step = abi.Step(
            *(numbers.ctypes.data for numbers in rows),
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
        return draw(logits, rows, top_candidates, draw_limited)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return top_candidates(logits, k)

    def move(self, source: int, target: int, tokens: int) -> None:
        self._cache.move(source, target, tokens)

    def pack(self, layers: Mapping[str, LowRank]) -> NativeAdapter:
        return NativeAdapter(layers, self._config, self._kept, self._rooms)

    def _scratch_for(self, rows: int, most_rank: int) -> list[int]:
        """Where a step's x, made, attended, narrow, wide and words are."""
        if self._asked != (rows, most_rank):
            before, after = self._widths
            sizes = [rows * numbers for numbers in (*before, most_rank, *after)]
            if self._scratch.numel() < sum(sizes):
                self._scratch = torch.empty(sum(sizes))
            starts = np.cumsum([0, *sizes[:-1]]) * self._scratch.element_size()
            self._places = [self._scratch.data_ptr() + int(start) for start in starts]
            self._asked = rows, most_rank
        return self._places


class _Cache:
    """Keys and values of every layer, (slots, K, length, E) each.

    Of up to `most` tokens a sequence, memory holds FIRST_TOKENS, and twice as many when that is too
    little: for a model's whole context there may be more asked for than a machine has.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], kind: int) -> None:
        layers, self.slots, heads, self.most, width = shape
        self._kind, self._length = kind, min(self.most, FIRST_TOKENS)
        whole = layers, self.slots, heads, self._length, width
        self._memory = [list(room(whole, DTYPES[kind]).unbind()) for _ in range(2)]
        self._view = self._seen()

    def fit(self, tokens: int) -> abi.Cache:
        """What the library is given, with room for sequences of `tokens`."""
        if tokens > self._length:
            kept = self._length
            while self._length < tokens:
                self._length = min(2 * self._length, self.most)
            for memory in self._memory:
                for layer, old in enumerate(memory):
                    slots, heads, _, width = old.shape
                    memory[layer] = room((slots, heads, self._length, width), old.dtype)
                    memory[layer][:, :, :kept] = old
            self._view = self._seen()
        return self._view

    def move(self, source: int, target: int, tokens: int) -> None:
        for layer in (*self._memory[0], *self._memory[1]):
            layer[target, :, :tokens] = layer[source, :, :tokens]

    def _seen(self) -> abi.Cache:
        return abi.Cache(*map(_addresses, self._memory), self._length, self._kind)


def _addresses(layers: Sequence[Tensor]) -> object:
    return (c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
