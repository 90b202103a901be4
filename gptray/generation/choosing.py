"""Choosing tokens with tensors alone: every row of logits by its own columns of settings.

No step waits for the device, so a CUDA graph can hold all of it.

Shapes: B rows, V entries of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Candidates are first looked for in chunks of this many entries of the vocabulary.
CHUNK = 64
# How far down a row is ranked when only top_p says where to end; all of it if that is too little.
FIRST_RANKS = 1024

# Tokens (B,), all within the vocabulary, and each row's largest logit (B,): where that is not
# finite the token means nothing.
Chosen = tuple[Tensor, Tensor]
# See `top_candidates`.
Top = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Columns:
    """What B rows ask of a draw, each (B, 1): off is a value that changes nothing.

    top_k int64, the others fp64; uniform: each row's random number in [0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


def draw_ranked(
    top: Top, logits: Tensor, columns: Columns, ranks: int, beyond: Sequence[int] | slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from the first `ranks` candidates, as many of them as top_k, top_p and min_p leave.

    beyond: the rows whose top_k is above `ranks`; a slice is all rows that might be. Returns tokens
    (B,), each row's largest logit and whether its ranks were enough: else the token is void.
    """
    values, ids = top(logits, ranks)
    best = values[:, 0]
    is_sound = torch.isfinite(best)
    values = torch.where(is_sound[:, None], values, 0.0)  # what comes of such a row is not used
    # (B, K), the first is 1
    weights = torch.exp((values.double() - values[:, :1]) / columns.temperature)
    cumulative = weights.cumsum(1)
    K, k = values.size(1), columns.top_k
    mass = cumulative.gather(1, k.clamp(max=K) - 1)  # of the top k
    if isinstance(beyond, slice) or beyond:
        # Of the whole row, where there is no top k.
        tail = (logits[beyond].double() - values[beyond, :1]) / columns.temperature[beyond]
        whole = torch.zeros_like(mass)
        whole[beyond] = torch.exp(tail).sum(1, keepdim=True)
        mass = torch.where(k > K, whole, mass)
    place = torch.arange(K, device=logits.device)
    eligible = (place < k) & (weights >= columns.min_p) & (weights > 0)
    # A candidate stays if those before it do not make up top_p of the mass yet.
    eligible &= (cumulative - weights < columns.top_p * mass) | (place == 0)
    count = eligible.sum(1, keepdim=True)
    enough = ((count < K) | (k <= K)).squeeze(1) | ~is_sound
    total = cumulative.gather(1, count - 1)
    choice = torch.searchsorted(cumulative, columns.uniform * total, right=True)
    tokens = ids.gather(1, torch.minimum(choice, count - 1)).squeeze(1)
    return tokens, best, enough


def draw_unranked(logits: Tensor, columns: Columns, has_min_p: bool) -> Chosen:
    """Draw from the whole vocabulary, or what min_p leaves of it, in the order of the ids."""
    best = logits.amax(1, keepdim=True)
    scaled = (logits - best) / columns.temperature.float()
    weights = torch.exp(scaled).double()  # (B, V)
    if has_min_p:
        weights = weights.masked_fill(weights < columns.min_p, 0.0)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # Right of equal sums, and below the last: an entry without weight is never chosen.
    below = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(columns.uniform * total, below)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logits.size(1) - 1), best.squeeze(1)


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (B, V), fp32, and their ids, (B, k) each; equals by lower id.

    torch.topk leaves open which of equal values it takes. The k largest lie in the k chunks of
    the vocabulary with the largest maxima, so that only those are looked at closely.
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
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: -0 is 0
    # As integers, floats of one sign are in order; the negative ones in reverse.
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(values.isnan(), 0x7FFFFFFF)
    keys = (order.to(torch.int64) << 32) | (0x7FFFFFFF - ids)
    best = keys.topk(k, dim=1, sorted=True).values
    return 0x7FFFFFFF - (best & 0xFFFFFFFF)
