"""Draws tokens with tensor operations alone, each row of logits with its own settings.

Nothing here waits for the device, so a CUDA graph can record all of it.

Shapes: B rows, V entries of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# `top_candidates` searches the vocabulary in chunks of this many entries.
CHUNK = 64
# Candidates that are ranked at first when only top_p bounds them; all are if these do not suffice.
FIRST_RANKS = 1024

# Tokens (B,), all within the vocabulary, and each row's largest logit (B,); a token whose row has
# no finite largest logit is void.
Chosen = tuple[Tensor, Tensor]
# See `top_candidates`.
Top = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Columns:
    """The settings of B rows, (B, 1) each; one that is off has a value without effect.

    top_k is int64, the others fp64. uniform: each row's random number in [0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


def draw_ranked(
    top: Top, logits: Tensor, columns: Columns, ranks: int, beyond: Sequence[int] | slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from those of the first `ranks` candidates that top_k, top_p and min_p leave.

    beyond: the rows whose top_k is above `ranks`, or a slice of all that may be. Returns tokens
    (B,), each row's largest logit (B,), and whether `ranks` sufficed (B,): if not, the row's token
    is void.
    """
    values, ids = top(logits, ranks)
    best = values[:, 0]
    is_sound = torch.isfinite(best)
    values = torch.where(is_sound[:, None], values, 0.0)  # an unsound row's token is not used
    # (B, K), relative to the likeliest
    weights = torch.exp((values.double() - values[:, :1]) / columns.temperature)
    cumulative = weights.cumsum(1)
    K, k = values.size(1), columns.top_k
    mass = cumulative.gather(1, k.clamp(max=K) - 1)  # the top k's
    if isinstance(beyond, slice) or beyond:
        # The whole row's, where top_k is above K.
        tail = (logits[beyond].double() - values[beyond, :1]) / columns.temperature[beyond]
        whole = torch.zeros_like(mass)
        whole[beyond] = torch.exp(tail).sum(1, keepdim=True)
        mass = torch.where(k > K, whole, mass)
    place = torch.arange(K, device=logits.device)
    eligible = (place < k) & (weights >= columns.min_p) & (weights > 0)
    # A candidate stays if those before it have not yet reached top_p of the mass.
    eligible &= (cumulative - weights < columns.top_p * mass) | (place == 0)
    count = eligible.sum(1, keepdim=True)
    enough = ((count < K) | (k <= K)).squeeze(1) | ~is_sound
    total = cumulative.gather(1, count - 1)
    choice = torch.searchsorted(cumulative, columns.uniform * total, right=True)
    tokens = ids.gather(1, torch.minimum(choice, count - 1)).squeeze(1)
    return tokens, best, enough


def draw_unranked(logits: Tensor, columns: Columns, has_min_p: bool) -> Chosen:
    """Draw from the whole vocabulary, or what min_p leaves of it, summed in the order of ids."""
    best = logits.amax(1, keepdim=True)
    scaled = (logits - best) / columns.temperature.float()
    weights = torch.exp(scaled).double()  # (B, V)
    if has_min_p:
        weights = weights.masked_fill(weights < columns.min_p, 0.0)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # Right of equal sums and below the total, so that an entry of zero weight is never chosen.
    below = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(columns.uniform * total, below)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logits.size(1) - 1), best.squeeze(1)


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row (B, V), as fp32, and their ids, (B, k) each.

    Ties go to the lower id, which torch.topk does not promise. The k largest lie within the k
    chunks of the vocabulary with the largest maxima, so only those chunks are ranked.
    """
    B, V = logits.shape
    k = min(k, V)
    chunks = -(-V // CHUNK)
    if 4 * k >= chunks:
        ids = _first(logits, torch.arange(V, device=logits.device).expand(B, V), k)
        return logits.gather(1, ids).float(), ids
    if V % CHUNK:
        logits = F.pad(logits, (0, chunks * CHUNK - V), value=float("-inf"))
    maxima = logits.view(B, chunks, CHUNK).amax(-1)
    near = _first(maxima, torch.arange(chunks, device=logits.device).expand(B, chunks), k)
    offsets = torch.arange(CHUNK, device=logits.device)
    ids = (near[:, :, None] * CHUNK + offsets).flatten(1)  # (B, k * CHUNK)
    ids = _first(logits.gather(1, ids), ids, k)
    return logits.gather(1, ids).float(), ids


def _first(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """The ids of the k first by (value descending, id ascending); values and ids (B, N).

    NaN, of either sign, comes before all numbers.
    """
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    # The bits of positive floats are in order as integers; those of negative ones in reverse.
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(values.isnan(), 0x7FFFFFFF)
    keys = (order.to(torch.int64) << 32) | (0x7FFFFFFF - ids)
    best = keys.topk(k, dim=1, sorted=True).values
    return 0x7FFFFFFF - (best & 0xFFFFFFFF)
