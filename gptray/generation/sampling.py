"""Draws the next token of every row from its logits, each with its own settings.

A row's token depends only on its logits, its settings and (seed, sample, position), never on its
neighbours in the batch. So candidates have one order (likelier first, ties by the lower id), sums
run in that order, and random numbers are a function of a counter.

Shapes: B rows of the batch, V entries of the vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptray.generation.choosing import (
    FIRST_RANKS,
    Chosen,
    Columns,
    Top,
    draw_ranked,
    draw_unranked,
    top_candidates,
)
from gptray.generation.philox import uniform
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import Mask

# Draws a token for each row of logits (B, V).
Choose = Callable[[Tensor, Sequence["Row"]], Chosen]


class Row(Protocol):
    """What drawing needs to know of a sequence; the same object at every step.

    history: its tokens so far, prompt included. ends: the tokens that end it. sample: which of its
    prompt's outputs it is. mask: keeps the next token from breaking a character
    (`gptray.generation.utf8`).
    """

    sampling: Sampling
    prompt_tokens: int
    history: list[int]
    ends: Sequence[int]
    sample: int
    mask: Mask | None

    @property
    def new_tokens(self) -> int:
        """How many tokens the row has drawn."""


class Drawn(NamedTuple):
    """A token; with `Sampling.logprobs`, also its log-probability and the likeliest tokens'.

    Log-probabilities (nats) are the model's own, before any setting changes the logits. top: pairs
    of id and log-probability, likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.no_grad()
def draw(
    logits: Tensor, rows: Sequence[Row], top: Top | None = None, ranked: Choose | None = None
) -> list[Drawn | None]:
    """Draw the next token of each row from logits (B, V), fp32, which are overwritten.

    None for a row whose logits are not a distribution (NaN, infinity, or nothing eligible).
    top, ranked: faster versions of `top_candidates` and `draw_ranked_rows`, with equal results.
    """
    assert logits.size(0) == len(rows)
    top = top or top_candidates
    ranked = ranked or partial(draw_ranked_rows, top)
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    logprobs = logits
    if asked:
        logprobs = torch.log_softmax(logits if len(asked) == len(rows) else logits[asked], dim=-1)
    _apply_settings(logits, rows)
    drawn: list[Drawn | None] = [None] * len(rows)
    ways: dict[Choose, list[int]] = {}
    for i, row in enumerate(rows):
        way = ranked if is_ranked(row.sampling) else _draw_unranked_rows
        ways.setdefault(_take_likeliest if row.sampling.is_greedy else way, []).append(i)
    for choose, members in ways.items():
        part = logits if len(members) == len(rows) else logits[members]
        tokens, best = choose(part, [rows[i] for i in members])
        for i, token, most in zip(members, tokens.tolist(), best.tolist(), strict=True):
            drawn[i] = Drawn(token) if math.isfinite(most) else None
    if asked:
        counts = [rows[i].sampling.logprobs or 0 for i in asked]
        own = [one.token if (one := drawn[i]) else 0 for i in asked]
        for i, scored in zip(asked, _report(logprobs, own, counts, top), strict=True):
            drawn[i] = drawn[i] and scored
    return drawn


@torch.no_grad()
def score(logits: Tensor, tokens: Sequence[int], count: int, top: Top | None = None) -> list[Drawn]:
    """Score the given token of each row of logits (B, V), with the `count` likeliest beside it.

    Raises ValueError if a row's logits are not a distribution.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    if not bool(torch.isfinite(logprobs.amax(1)).all()):
        raise ValueError("the model's logits are not finite for this prompt")
    return _report(logprobs, tokens, [count] * len(tokens), top or top_candidates)


def _apply_settings(logits: Tensor, rows: Sequence[Row]) -> None:
    """Apply bias, penalties, minimum length and masks to logits (B, V), in place.

    Only the entries concerned are touched. An id that occurs several times is written the same
    value each time, because all are read before any is written.
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
        places = [(i, number) for i in unfinished for number in rows[i].ends]
        logits[tuple(zip(*places, strict=True))] = float("-inf")
    _apply_masks(logits, rows)


def _apply_masks(logits: Tensor, rows: Sequence[Row]) -> None:
    """Set banned tokens to -inf; a mask lists either those or the allowed ones."""
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
    """Indices of each row's ids, (R, 1) and (R, most ids); rows with fewer repeat their first."""
    lists = list(ids.values())
    if any(one is not lists[0] for one in lists):
        most = max(map(len, lists))
        lists = [torch.cat([one, one[:1].expand(most - len(one))]) for one in lists]
    columns = torch.stack(lists)
    return torch.tensor(list(ids), device=columns.device)[:, None], columns


def is_ranked(sampling: Sampling) -> bool:
    """Whether drawing needs ranked candidates, for top_k or top_p."""
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    is_cut = sampling.top_k is not None or top_p < 1.0
    return is_cut and not sampling.is_greedy


def _take_likeliest(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    best, tokens = logits.max(dim=-1)
    return tokens, best


def draw_ranked_rows(top: Top, logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """Draw from the ranked candidates that top_k, top_p and min_p leave, V of them at most."""
    V = logits.size(1)
    ranks = min(max(row.sampling.top_k or FIRST_RANKS for row in rows), V)
    beyond = [i for i, row in enumerate(rows) if min(row.sampling.top_k or V, V) > ranks]
    tokens, best, enough = draw_ranked(top, logits, _columns(rows, logits), ranks, beyond)
    again = [] if bool(enough.all()) else (~enough).nonzero()[:, 0].tolist()
    if again:
        part = logits[again]
        columns = _columns([rows[i] for i in again], logits)
        tokens[again], _, _ = draw_ranked(top, part, columns, V, [])
    return tokens, best


def _draw_unranked_rows(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    columns = _columns(rows, logits)
    return draw_unranked(logits, columns, any(row.sampling.min_p for row in rows))


def _columns(rows: Sequence[Row], logits: Tensor) -> Columns:
    """The rows' settings as columns on the device of logits (B, V)."""
    device, V = logits.device, logits.size(1)
    settings = [row.sampling for row in rows]
    asked = [
        [s.temperature for s in settings],
        [V if s.top_k is None else min(s.top_k, V) for s in settings],
        [1.0 if s.top_p is None else s.top_p for s in settings],
        [s.min_p or 0.0 for s in settings],
    ]
    columns = torch.tensor(asked, dtype=torch.float64).to(device)[:, :, None]
    numbers = uniform(
        [s.seed for s in settings], [row.sample for row in rows], [row.new_tokens for row in rows]
    )
    temperature, top_k, top_p, min_p = columns.unbind()
    return Columns(temperature, top_k.long(), top_p, min_p, numbers.to(device)[:, None])


def _report(
    logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int], top: Top
) -> list[Drawn]:
    """Each row's token with its log-probability, and its `counts` likeliest with theirs."""
    values, ids = top(logprobs, max(1, *counts))
    own = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0]
    return [
        Drawn(token, logprob, tuple(zip(likeliest[:n], best[:n], strict=True)))
        for token, logprob, likeliest, best, n in zip(
            tokens, own.tolist(), ids.tolist(), values.tolist(), counts, strict=True
        )
    ]
