"""Losses of a split, and the cost of quantization on the same text.

Windows can be scored in any order and by any worker. Sums are kept per document in float64, so that
neither the division of the work nor the batch size changes the result beyond rounding.
`gptray.data.scoring` defines the windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptray.config.values import Precision
from gptray.data.difference import percent
from gptray.data.scoring import Score, Windows
from gptray.data.tokens import TokenSplit
from gptray.evaluation.result import QuantizedResult, SplitResult
from gptray.model.precision import pick_dtype

# Tokens read at a time when searching for document ends.
SEARCH_TOKENS = 1 << 20


@dataclass(frozen=True)
class DocumentSums:
    """Summed nats and target counts of some documents, each of shape (documents,).

    `documents` are their positions in the split, ascending. A document that is scored in several
    parts appears in the sums of each.
    """

    documents: NDArray[np.int64]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @classmethod
    def of(
        cls, documents: NDArray[np.int64], nats: NDArray[np.float64], tokens: NDArray[np.int64]
    ) -> DocumentSums:
        """Add up the values that belong to the same document."""
        names, place = np.unique(documents, return_inverse=True)
        counts = np.bincount(place, weights=tokens).astype(np.int64)
        return cls(names, np.bincount(place, weights=nats).astype(np.float64), counts)

    @classmethod
    def joined(cls, parts: Sequence[DocumentSums]) -> DocumentSums:
        """The sums of all parts, added in the given order so that the result is reproducible."""
        return cls.of(
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.nats for part in parts]),
            np.concatenate([part.tokens for part in parts]),
        )

    @property
    def standard_error(self) -> float | None:
        """The loss's standard error, with documents as a random sample; None for fewer than two.

        sqrt(D / (D - 1) x sum_d (nats_d - loss x tokens_d)^2) / tokens (Cochran 1977, 6.13)
        """
        count = len(self.documents)
        if count < 2:
            return None
        loss = self.nats.sum() / self.tokens.sum()
        residuals = self.nats - loss * self.tokens
        spread = math.sqrt(count / (count - 1) * float((residuals**2).sum()))
        return spread / float(self.tokens.sum())


def scoring_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype for `evaluate.precision`; auto is fp32 on a CPU.

    Raises UserError for a GPU that does not compute in bf16.
    """
    if precision == "auto" and device.type == "cpu":
        return torch.float32
    return pick_dtype(precision, device, key="evaluate.precision")


def document_ends(split: TokenSplit, eos_id: int) -> NDArray[np.int64]:
    """Positions of the end-of-text tokens that close documents, or turns of chats, ascending."""
    found = []
    for start in range(0, len(split), SEARCH_TOKENS):
        tokens = split.slice(start, min(start + SEARCH_TOKENS, len(split)))
        found.append(start + np.flatnonzero(tokens == eos_id))
    return np.concatenate(found) if found else np.empty(0, np.int64)


class Scored(Protocol):
    """A model to score: a `GPT`, or a network that reads like the engine."""

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of targets (B, T) after idx (B, T), in nats; (B, T)."""


# Maps inputs and targets, (B, T) each, to M measures of each target, (M, B, T), in float64.
Measure = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def sum_windows(
    measure: Measure,
    split: TokenSplit,
    windows: Windows,
    numbers: Sequence[int],
    *,
    ends: NDArray[np.int64],
    batch_size: int,
    device: torch.device,
) -> list[DocumentSums]:
    """Sum each of the M measures over the scored targets of some windows.

    numbers: which windows, ascending. ends: `document_ends` of the split; an end of text belongs to
    the document that it closes. Tokens that begin a document are read but not scored.
    """
    documents, found = [], []
    for batch, tokens in windows.batches(split, numbers, batch_size):
        read = torch.from_numpy(tokens).to(device)  # (B, T + 1)
        values = measure(read[:, :-1], read[:, 1:]).cpu().numpy()  # (M, B, T)
        for row, (number, of_window) in enumerate(zip(batch, tokens, strict=True)):
            places = np.array(windows.counted(number))
            is_scored = split.counts(of_window[len(of_window) - len(places) :])
            found.append(values[:, row, values.shape[2] - len(places) :][:, is_scored])
            documents.append(np.searchsorted(ends, places[is_scored]))
    of = np.concatenate(documents)
    ones = np.ones(len(of), np.int64)
    return [DocumentSums.of(of, flat, ones) for flat in np.concatenate(found, axis=1)]


def losses(models: Sequence[Scored], idx: Tensor, targets: Tensor) -> Tensor:
    """Losses (1, B, T), in float64, under the models' average probability of each target.

    -log(1/M sum_m exp(-loss_m)); for one model, exactly its loss.
    """
    each = torch.stack([model.token_losses(idx, targets).double() for model in models])
    return math.log(len(models)) - torch.logsumexp(-each, dim=0, keepdim=True)


def split_result(
    sums: DocumentSums, split: TokenSplit, windows: Windows, numbers: Sequence[int]
) -> SplitResult:
    """The results for a split whose windows `numbers` were scored.

    A part of a split is assumed to have as many bytes, and lost bytes, per token as the whole.
    Lost bytes raise every document's loss per token equally, so they do not change its error.
    """
    tokens, whole = int(sums.tokens.sum()), len(numbers) == len(windows)
    read = sum(len(windows.counted(number)) for number in numbers)
    num_bytes, lost_bytes = (
        amount if whole else round(amount * read / (len(split) - 1))
        for amount in (split.bytes, split.lost_bytes)
    )
    score = Score.charged(float(sums.nats.sum()), tokens, num_bytes, lost_bytes)
    return {
        "loss": score.loss,
        "stderr": sums.standard_error,
        "ppl": score.perplexity if math.isfinite(score.perplexity) else None,
        "bpb": score.bits_per_byte,
        "tokens": tokens,
        "bytes": num_bytes,
        "lost_bytes": lost_bytes,
        "documents": len(sums.documents),
        "how": _how(split, windows, len(numbers), len(sums.documents))
        + _charge(score, whole=whole),
    }


def _charge(score: Score, *, whole: bool) -> str:
    if not score.lost_bytes:
        return ""
    which = "" if whole else ", by the split's mean"
    return (
        f"; each byte that the tokenizer loses counts 8 bits, {percent(score.lost)} of the "
        f"text{which}"
    )


def _how(split: TokenSplit, windows: Windows, scored: int, documents: int) -> str:
    whole = scored == len(windows)
    which = "every token but the first" if whole else "a fixed sample, spread evenly"
    if split.document_prefix:
        which += ", without those that begin a document"
    context = (
        "side by side"
        if windows.stride == windows.block_size
        else f"{windows.stride} apart, the rest of each window being context"
    )
    unit = "turns of chats" if split.ends_turns else "documents"
    error = f"standard error over {documents:,} {unit}" if documents > 1 else "one document"
    of = f"{scored:,}" if whole else f"{scored:,} of {len(windows):,}"
    return (
        f"{which}: {of} windows of {windows.block_size} tokens, {context}; cross-entropy in fp32, "
        f"dropout off; {error}"
    )


class Reader(Protocol):
    """A network with one kind of weights."""

    def read(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses in nats of targets (B, T) after idx (B, T), and the likeliest tokens, (B, T)."""


def compared(readers: Sequence[Reader], idx: Tensor, targets: Tensor) -> Tensor:
    """Compare K readers, the one with full weights first; (2 K - 1, B, T) in float64.

    First the K losses, then, for all but the first, whether the likeliest token is the first's.
    """
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
    """The cost of K kinds of weights, the full ones first.

    sums: of the measures from `compared`. weight_bytes: of each kind. windows, numbers: as for
    `split_result`.
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
