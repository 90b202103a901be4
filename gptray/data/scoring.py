"""How a stream of tokens is scored: which windows are read, which targets count, what a sum means.

Pure arithmetic on positions; the network that gives each target its loss is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptray.data.tokens import TokenSplit

# Nats that every lost byte of a text costs: 8 bits, so that forgetting never pays.
NATS_PER_LOST_BYTE = 8 * math.log(2)


@dataclass(frozen=True)
class Windows:
    """Windows of `block_size` inputs, `stride` apart, over a stream of `tokens`.

    Window n reads tokens [n x stride, n x stride + block_size), predicts for each the next one, and
    counts the targets that no window before it has counted: so every token but the first counts
    once, with at least block_size - stride + 1 tokens before it, in all windows but the first.
    (Hugging Face's "Perplexity of fixed-length models", on inputs and targets.)
    """

    tokens: int
    block_size: int
    stride: int

    def __post_init__(self) -> None:
        assert 1 <= self.stride <= self.block_size, (self.stride, self.block_size)

    def __len__(self) -> int:
        if self.tokens < 2:
            return 0
        return 1 + math.ceil(max(0, self.tokens - 1 - self.block_size) / self.stride)

    def span(self, number: int) -> tuple[int, int]:
        """First and last + 1 of the tokens that window `number` reads or predicts."""
        start = number * self.stride
        return start, min(start + self.block_size + 1, self.tokens)

    def counted(self, number: int) -> range:
        """Positions of the targets that count in window `number`."""
        first = self.span(number - 1)[1] if number else 1
        return range(first, self.span(number)[1])

    def sample(self, targets: int) -> list[int]:
        """Numbers of windows that count about so many targets, spread evenly, always the same.

        All of them where there are no more.
        """
        wanted = max(1, math.ceil(targets / self.stride))
        if wanted >= len(self) or targets >= self.tokens - 1:
            return list(range(len(self)))
        return [i * len(self) // wanted for i in range(wanted)]

    def batches(
        self, split: TokenSplit, numbers: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
        """The windows of these numbers, ascending: numbers and tokens, (B, T + 1), B <= batch_size.

        The stream's last window may be shorter, and then comes alone.
        """
        for group in self.groups(numbers, batch_size):
            yield list(group), np.stack([split.slice(*self.span(n)) for n in group])

    def groups(self, numbers: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        """The numbers of each of these batches."""
        short = self.span(len(self) - 1)
        is_short = short[1] - short[0] <= self.block_size
        alone = [n for n in numbers[-1:] if is_short and n == len(self) - 1]
        whole = numbers[: len(numbers) - len(alone)]
        groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
        return [*groups, *([alone] if alone else [])]


@dataclass(frozen=True)
class Score:
    """Nats over `tokens` predicted tokens of a text of `num_bytes` UTF-8 bytes.

    They include 8 bits for each of the `lost_bytes` that the tokenizer does not give back: a
    tokenizer that drops half of the text would otherwise have half of the text to predict.
    """

    nats: float
    tokens: int
    num_bytes: int
    lost_bytes: int = 0

    @classmethod
    def charged(cls, nats: float, tokens: int, num_bytes: int, lost_bytes: int) -> Score:
        """The score of tokens that cost `nats`, with what the lost bytes cost."""
        return cls(nats + NATS_PER_LOST_BYTE * lost_bytes, tokens, num_bytes, lost_bytes)

    @property
    def lost(self) -> float:
        """Share of the text that the tokenizer does not give back."""
        return self.lost_bytes / self.num_bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether a float holds the perplexity that the loss has without charge."""
        return (self.nats - NATS_PER_LOST_BYTE * self.lost_bytes) / self.tokens < 709

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: loss x tokens / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.num_bytes)


def charge_per_token(split: TokenSplit) -> float:
    """Nats by which a split's lost bytes raise its loss: 8 bits each, shared by what counts."""
    tokens = split.tokens - split.documents * len(split.document_prefix)
    return NATS_PER_LOST_BYTE * split.lost_bytes / tokens
