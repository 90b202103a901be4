"""How a stream of tokens is scored: which windows are read, which targets count, the metrics.

Pure arithmetic on positions; the caller computes the losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptray.data.tokens import TokenSplit

# The charge for a lost byte of text: 8 bits, so that losing text never improves a score.
NATS_PER_LOST_BYTE = 8 * math.log(2)


@dataclass(frozen=True)
class Windows:
    """Windows of `block_size` inputs, `stride` apart, over a stream of `tokens`.

    Window n reads tokens [n x stride, n x stride + block_size), predicts the token after each, and
    counts the targets that no earlier window counted. So every token but the first counts once, and
    in all windows but the first has at least block_size - stride + 1 tokens of context.
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
        """The range [start, stop) of tokens that window `number` reads or predicts."""
        start = number * self.stride
        return start, min(start + self.block_size + 1, self.tokens)

    def counted(self, number: int) -> range:
        """Positions of the targets that window `number` counts."""
        first = self.span(number - 1)[1] if number else 1
        return range(first, self.span(number)[1])

    def sample(self, targets: int) -> list[int]:
        """Numbers of evenly spread windows, always the same, that hold about `targets` targets.

        All windows if they hold fewer.
        """
        wanted = max(1, math.ceil(targets / self.stride))
        if wanted >= len(self) or targets >= self.tokens - 1:
            return list(range(len(self)))
        return [i * len(self) // wanted for i in range(wanted)]

    def batches(
        self, split: TokenSplit, numbers: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
        """Yield batches of windows (`numbers` ascends): their numbers, and tokens (B, T + 1).

        B is at most `batch_size`. The stream's last window is a batch of its own if it is shorter.
        """
        for group in self.groups(numbers, batch_size):
            yield list(group), np.stack([split.slice(*self.span(n)) for n in group])

    def groups(self, numbers: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        """The window numbers of each batch of `batches`."""
        short = self.span(len(self) - 1)
        is_short = short[1] - short[0] <= self.block_size
        alone = [n for n in numbers[-1:] if is_short and n == len(self) - 1]
        whole = numbers[: len(numbers) - len(alone)]
        groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
        return [*groups, *([alone] if alone else [])]


@dataclass(frozen=True)
class Score:
    """The loss in nats over `tokens` predicted tokens of a text of `num_bytes` UTF-8 bytes.

    It includes 8 bits for each of the `lost_bytes` that decoding does not restore: otherwise a
    tokenizer that drops half of the text would have only the other half to predict.
    """

    nats: float
    tokens: int
    num_bytes: int
    lost_bytes: int = 0

    @classmethod
    def charged(cls, nats: float, tokens: int, num_bytes: int, lost_bytes: int) -> Score:
        """The score of tokens that cost `nats`, plus the charge for the lost bytes."""
        return cls(nats + NATS_PER_LOST_BYTE * lost_bytes, tokens, num_bytes, lost_bytes)

    @property
    def lost(self) -> float:
        """Share of the text that decoding does not restore."""
        return self.lost_bytes / self.num_bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether the perplexity without the charge fits into a float."""
        return (self.nats - NATS_PER_LOST_BYTE * self.lost_bytes) / self.tokens < 709

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: loss x tokens / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.num_bytes)


def charge_per_token(split: TokenSplit) -> float:
    """Nats per counted token that a split's lost bytes add to its loss: 8 bits per byte."""
    tokens = split.tokens - split.documents * len(split.document_prefix)
    return NATS_PER_LOST_BYTE * split.lost_bytes / tokens
