"""The KV cache of a decoder that PyTorch runs; shapes as in `gptray.generation.decoder`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptray.model.gpt import GPT

# Keys are read up to a multiple of this: sums over them then group in the same way at any length.
LENGTH_STEP = 32
# Of each sequence, for which a cache takes memory at once.
FIRST_TOKENS = 1024


class Cache:
    """Keys and values of every layer for S sequences of up to P tokens, in memory allocated once.

    Products over contiguous keys are several times faster than over slices of longer
    rows. So each layer's memory is viewed as (S, K, length, E) with the least `length` that holds
    the longest sequence, and is laid out anew when that changes: once in LENGTH_STEP tokens. The
    memory holds FIRST_TOKENS a sequence, and twice as many when that is too little.
    """

    def __init__(self, model: GPT, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self._shape = slots, config.kv_heads, config.head_width
        self._most = _rounded(config.n_positions)
        self._room = min(self._most, FIRST_TOKENS)
        numbers = self._numbers(self._room)
        self._memory = [
            tuple(torch.zeros(numbers, dtype=dtype, device=device) for _ in range(2))
            for _ in range(config.n_layer)
        ]
        self.length = LENGTH_STEP
        self.layers = [self._views(memory, self.length) for memory in self._memory]

    def _numbers(self, room: int) -> int:
        return math.prod(self._shape) * room

    def fit(self, tokens: int, used: int) -> None:
        """Make room for sequences of `tokens`, keeping what slots 0 .. used - 1 hold.

        Raises OutOfMemoryError if there is no memory for it; the cache then stays as it was.
        """
        length = _rounded(tokens)
        # A sequence that ends often makes way for one as long: do not shrink for a little.
        if self.length // 2 < length <= self.length:
            return
        room = grown(self._room, length, self._most)
        try:
            self._lay_out(length, used, room)
        except BaseException:
            self._lay_out(self.length, used, self._room)
            raise
        self.length, self._room = length, room

    def _lay_out(self, length: int, used: int, room: int) -> None:
        """View every layer's memory, of `room` tokens a slot at least, with another length."""
        for layer, (old_k, old_v) in enumerate(self.layers):
            kept = min(length, old_k.size(2))
            if old_k.size(2) == length:
                continue
            old = old_k[:used, :, :kept].clone(), old_v[:used, :, :kept].clone()
            if self._memory[layer][0].numel() < self._numbers(room):
                self._memory[layer] = tuple(old_k.new_zeros(self._numbers(room)) for _ in range(2))
            self.layers[layer] = self._views(self._memory[layer], length)
            for seen, one in zip(self.layers[layer], old, strict=True):
                seen[:used, :, :kept] = one
                seen[:used, :, kept:] = 0.0  # what lay there may not be finite, see `scrub`

    def grow(self, tokens: int) -> None:
        """Make room for a sequence of `tokens`, keeping all that all slots hold."""
        self.fit(max(tokens, self.length), self._shape[0])

    def move(self, source: int, target: int, tokens: int) -> None:
        for keys, values in self.layers:
            keys[target, :, :tokens] = keys[source, :, :tokens]
            values[target, :, :tokens] = values[source, :, :tokens]

    def scrub(self, tokens: Sequence[int]) -> None:
        """Zero all memory but the first `tokens[slot]` positions of each slot.

        Attention gives what it does not see a weight of 0, which makes NaN of NaN and infinity.
        """
        for layer, memory in zip(self.layers, self._memory, strict=True):
            for seen, numbers in zip(layer, memory, strict=True):
                kept = [seen[slot, :, :count].clone() for slot, count in enumerate(tokens)]
                numbers.zero_()
                for slot, one in enumerate(kept):
                    seen[slot, :, : one.size(1)] = one

    def _views(self, memory: tuple[Tensor, ...], length: int) -> tuple[Tensor, Tensor]:
        slots, heads, width = self._shape
        shape = slots, heads, length, width
        keys, values = (one[: math.prod(shape)].view(shape) for one in memory)
        return keys, values


def grown(room: int, tokens: int, most: int) -> int:
    """The room for each sequence, doubled until `tokens` fit, but at most `most`."""
    while room < tokens:
        room = min(2 * room, most)
    return room


def _rounded(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
