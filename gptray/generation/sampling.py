"""Drawing the next token of every row, each by its own settings: functions on logits.

A row's token depends on its logits, its settings and (seed, row, position) alone: the same
whatever its neighbours in the batch ask for. For that, candidates have one order (likelier first,
then the lower id, so that ties are never cut at random), sums run along that order, and the
random number is a function of a counter.

Shapes: B rows of the batch, V entries of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.generation.philox import uniform
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import Mask

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
class Row:
    """One row of a batch, as far as drawing its next token goes.

    row: which of a request's outputs it is. history: its tokens so far, prompt included. mask: the
    tokens that would break a character (`gptray.generation.utf8`).
    """

    sampling: Sampling
    prompt_tokens: int
    history: Sequence[int]
    eos_id: int
    row: int = 0
    mask: Mask | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.history) - self.prompt_tokens


@dataclass(frozen=True)
class Drawn:
    """A token; with `Sampling.logprobs` its log-probability and the likeliest tokens' too.

    Log-probabilities are the model's own, before any setting changes them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.no_grad()
def draw(logits: Tensor, rows: Sequence[Row], top: Top | None = None) -> list[Drawn | None]:
    """Draw the next token of each row from logits (B, V), fp32, which are overwritten.

    None for a row whose logits are not a distribution (NaN, infinity, or nothing eligible).
    top: a faster `top_candidates`, to the same effect.
    """
    assert logits.size(0) == len(rows)
    top = top or top_candidates
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    logprobs = _log_softmax(logits, asked)
    _shape(logits, rows)
    tokens, sound = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows)).bool()
    for members, choose in (
        ([i for i, r in enumerate(rows) if r.sampling.is_greedy], _greedy),
        ([i for i, r in enumerate(rows) if _is_ranked(r.sampling)], partial(_draw_ranked, top)),
        ([i for i, r in enumerate(rows) if _is_unranked(r.sampling)], _draw_unranked),
    ):
        if members:
            part = logits if len(members) == len(rows) else logits[members]
            chosen, best = choose(part, [rows[i] for i in members])
            tokens[members], sound[members] = chosen.cpu(), torch.isfinite(best).cpu()
    drawn = [
        Drawn(token) if is_sound else None
        for token, is_sound in zip(tokens.tolist(), sound.tolist(), strict=True)
    ]
    if asked:
        counts = [rows[i].sampling.logprobs or 0 for i in asked]
        scored = _report(logprobs, tokens[asked].tolist(), counts, top)
        for i, with_logprobs in zip(asked, scored, strict=True):
            drawn[i] = drawn[i] and with_logprobs
    return drawn


@torch.no_grad()
def score(logits: Tensor, tokens: Sequence[int], count: int, top: Top | None = None) -> list[Drawn]:
    """Each row's token with its log-probability in logits (B, V), and the `count` likeliest.

    Raises ValueError if a row's logits are not a distribution.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    if not bool(torch.isfinite(logprobs.amax(1)).all()):
        raise ValueError("the model's logits are not finite for this prompt")
    return _report(logprobs, tokens, [count] * len(tokens), top or top_candidates)


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
    """The ids of the k first by (value descending, id ascending); values and ids (B, N)."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: -0 is 0
    # As integers, floats of one sign are in order; the negative ones in reverse.
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    keys = (order << 32) | (0x7FFFFFFF - ids)
    best = keys.topk(k, dim=1, sorted=True).values
    return 0x7FFFFFFF - (best & 0xFFFFFFFF)


def _shape(logits: Tensor, rows: Sequence[Row]) -> None:
    """Apply bias, penalties, minimum length and masks; only entries that they name are touched.

    An id that is there several times gets the same value each time: all are read before one is
    written.
    """
    for i, row in enumerate(rows):
        sampling = row.sampling
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            logits[i, list(ids)] += torch.tensor(biases, device=logits.device)
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(row.history, device=logits.device)
            values, penalty = logits[i, seen], sampling.repetition_penalty
            # Keskar et al. 2019, CTRL
            logits[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if row.new_tokens and (sampling.frequency_penalty or sampling.presence_penalty):
            new = torch.tensor(row.history[row.prompt_tokens :], device=logits.device)
            times = torch.bincount(new)[new]
            penalties = sampling.frequency_penalty * times + sampling.presence_penalty
            logits[i, new] = logits[i, new] - penalties
    unfinished = [i for i, row in enumerate(rows) if row.new_tokens < row.sampling.min_new_tokens]
    if unfinished:
        logits[unfinished, [rows[i].eos_id for i in unfinished]] = float("-inf")
    _mask(logits, rows)


def _mask(logits: Tensor, rows: Sequence[Row]) -> None:
    """Leave what may be drawn: between characters a few entries go, inside one a few stay."""
    masks = [(i, row.mask) for i, row in enumerate(rows) if row.mask]
    banned = {i: mask.banned for i, mask in masks if mask.banned is not None}
    allowed = {i: mask.allowed for i, mask in masks if mask.allowed is not None}
    if len(banned) == len(rows) and len({id(ids) for ids in banned.values()}) == 1:
        logits.index_fill_(1, banned[0], float("-inf"))
    elif banned:
        logits[_places(banned)] = float("-inf")
    if allowed:
        places = _places(allowed)
        kept = logits[places]
        logits.index_fill_(0, places[0][:, 0], float("-inf"))
        logits[places] = kept


def _places(ids: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Where these ids of these rows stand; rows that have fewer repeat one."""
    lists = list(ids.values())
    if any(one is not lists[0] for one in lists):
        most = max(map(len, lists))
        lists = [torch.cat([one, one[:1].expand(most - len(one))]) for one in lists]
    columns = torch.stack(lists)
    return torch.tensor(list(ids), device=columns.device)[:, None], columns


def _is_ranked(sampling: Sampling) -> bool:
    limited = sampling.top_k is not None or (sampling.top_p or 1.0) < 1.0
    return limited and not sampling.is_greedy


def _is_unranked(sampling: Sampling) -> bool:
    return not sampling.is_greedy and not _is_ranked(sampling)


def _greedy(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    best, tokens = logits.max(dim=-1)
    return tokens, best


def _draw_ranked(top: Top, logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Draw from the first of the ranked candidates, as many as top_k, top_p and min_p leave."""
    V = logits.size(1)
    limits = [row.sampling.top_k or V for row in rows]
    ranks = min(max(row.sampling.top_k or FIRST_RANKS for row in rows), V)
    tokens, best, enough = _draw_among(top, logits, rows, limits, ranks)
    if not all(enough):
        again = [i for i, is_enough in enumerate(enough) if not is_enough]
        part = [rows[i] for i in again]
        tokens[again], _, _ = _draw_among(top, logits[again], part, [limits[i] for i in again], V)
    return tokens, best


def _draw_among(
    top: Top, logits: Tensor, rows: Sequence[Row], limits: Sequence[int], ranks: int
) -> tuple[Tensor, Tensor, list[bool]]:
    """Draw from the first `ranks` candidates; for each row also whether those were enough."""
    values, ids = top(logits, ranks)
    best = values[:, 0]
    is_sound = torch.isfinite(best)
    values = torch.where(is_sound[:, None], values, 0.0)  # what comes of such a row is not used
    temperature = _column(rows, "temperature", logits)
    weights = torch.exp((values.double() - values[:, :1]) / temperature)  # (B, K), first is 1
    cumulative = weights.cumsum(1)
    K = values.size(1)
    k = torch.tensor(limits, device=logits.device).clamp(max=logits.size(1))[:, None]
    mass = cumulative.gather(1, k.clamp(max=K) - 1)  # of the top k
    beyond = (k > K).squeeze(1)  # only without a top k, where the mass is the whole row's
    if beyond.any():
        tail = torch.exp((logits[beyond].double() - values[beyond, :1]) / temperature[beyond])
        mass[beyond] = tail.sum(1, keepdim=True)
    top_p = _column(rows, "top_p", logits, off=1.0)
    min_p = _column(rows, "min_p", logits, off=0.0)
    place = torch.arange(K, device=logits.device)
    eligible = (place < k) & (weights >= min_p) & (weights > 0)
    # A candidate stays if those before it do not make up top_p of the mass yet.
    eligible &= (cumulative - weights < top_p * mass) | (place == 0)
    count = eligible.sum(1, keepdim=True)
    enough = ((count < K) | (k <= K)).squeeze(1) | ~is_sound
    total = cumulative.gather(1, count - 1)
    target = _uniform(rows, logits) * total
    choice = torch.searchsorted(cumulative, target, right=True)
    tokens = ids.gather(1, torch.minimum(choice, count - 1)).squeeze(1)
    return tokens, best, enough.tolist()


def _draw_unranked(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Draw from the whole vocabulary, or what min_p leaves of it, in the order of the ids."""
    best = logits.amax(1, keepdim=True)
    scaled = (logits - best) / _column(rows, "temperature", logits).float()
    weights = torch.exp(scaled).double()  # (B, V)
    min_p = _column(rows, "min_p", logits, off=0.0)
    if bool((min_p > 0).any()):
        weights = weights.masked_fill(weights < min_p, 0.0)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # Right of equal sums, and below the last: an entry without weight is never chosen.
    target = torch.minimum(_uniform(rows, logits) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logits.size(1) - 1), best.squeeze(1)


def _uniform(rows: Sequence[Row], like: Tensor) -> Tensor:
    numbers = uniform(
        [row.sampling.seed for row in rows],
        [row.row for row in rows],
        [row.new_tokens for row in rows],
    )
    return numbers.to(like.device)[:, None]


def _column(rows: Sequence[Row], name: str, like: Tensor, *, off: float = 0.0) -> Tensor:
    values = [getattr(row.sampling, name) for row in rows]
    column = [off if value is None else float(value) for value in values]
    return torch.tensor(column, dtype=torch.float64, device=like.device)[:, None]


def _log_softmax(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Of these rows, (len(rows), V)."""
    return torch.log_softmax(logits if len(rows) == len(logits) else logits[rows], dim=-1)


def _report(
    logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int], top: Top
) -> list[Drawn]:
    """Each row's token with its log-probability and that of its `count` likeliest."""
    values, ids = top(logprobs, max(1, *counts))
    own = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0]
    return [
        Drawn(token, logprob, tuple(zip(likeliest[:n], best[:n], strict=True)))
        for token, logprob, likeliest, best, n in zip(
            tokens, own.tolist(), ids.tolist(), values.tolist(), counts, strict=True
        )
    ]
