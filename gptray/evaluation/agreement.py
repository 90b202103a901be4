"""What weights in fewer bits cost: the same text, read with the full ones and with each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gptray.data.scoring import Windows
from gptray.data.tokens import TokenSplit
from gptray.evaluation.metrics import DocumentSums, split_result
from gptray.evaluation.result import QuantizedResult


class Reader(Protocol):
    """A network with one kind of weights."""

    def read(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of targets (B, T) after idx (B, T): losses in nats, and the likeliest tokens."""


def compared(readers: Sequence[Reader], idx: Tensor, targets: Tensor) -> Tensor:
    """Of K readers, the full weights' first: the losses of each, and for each but the first whether
    its likeliest token is the first's; (2 K - 1, B, T) in float64."""
    losses, likeliest = zip(*(reader.read(idx, targets) for reader in readers), strict=True)
    agrees = [tokens == likeliest[0] for tokens in likeliest[1:]]
    return torch.stack([one.double() for one in (*losses, *agrees)])


def quantized_results(
    kinds: Sequence[str],
    sums: Sequence[DocumentSums],
    weight_bytes: Sequence[int],
    split: TokenSplit,
    windows: Windows,
    numbers: Sequence[int],
) -> list[QuantizedResult]:
    """What K kinds of weights cost, the full ones first.

    sums: of what `compared` gives. weight_bytes: of each kind. Windows and numbers as
    `split_result`'s.
    """
    losses, agreed = sums[: len(kinds)], sums[len(kinds) :]
    full = losses[0]
    shares = [1.0, *(float(one.nats.sum() / one.tokens.sum()) for one in agreed)]
    results: list[QuantizedResult] = []
    for kind, one, share, size in zip(kinds, losses, shares, weight_bytes, strict=True):
        score = split_result(one, split, windows, numbers)
        change = replace(one, nats=one.nats - full.nats)
        results.append(
            {
                "weights": kind,
                "loss": score["loss"],
                "bpb": score["bpb"],
                "loss_change": float(change.nats.sum() / change.tokens.sum()),
                "change_stderr": change.standard_error,
                "agreement": share,
                "weight_bytes": size,
            }
        )
    return results
