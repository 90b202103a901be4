"""Draws tokens on the GPU, in one CUDA graph with one copy to the device and one back.

The results equal those of `gptray.generation.sampling.draw`, which still draws rows with rarer
settings (bias, penalties, log-probabilities, a very large top_k).

Shapes: S slots, B rows of a draw, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from gptray.generation import gpu_kernels
from gptray.generation.choosing import (
    FIRST_RANKS,
    Columns,
    draw_ranked,
    draw_unranked,
    top_candidates,
)
from gptray.generation.recording import Graphs, Inbox, Mirror
from gptray.generation.sampling import Drawn, Row, draw, is_ranked
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import Mask

# What the host sends for each row: integers, then fp64 numbers, 8 bytes each.
_WHOLE = ("kind", "top_k", "seed", "row", "new_tokens", "mask", "banned")
_REAL = ("temperature", "top_p", "min_p")
_GREEDY, _RANKED, _UNRANKED, _RARE = range(4)
# Candidates that are ranked unless a row's top_k is larger.
_FEW_RANKS = 64
# The most different masks: one per state of the automaton and number of tokens left, and no mask.
_MASKS = 64
# Flags in the bits above a token's id: a token could be drawn; its ranks sufficed.
_SOUND, _ENOUGH = 1 << 40, 1 << 41


def token_of(codes: Tensor) -> Tensor:
    """Tokens without their flags; 0 where none could be drawn."""
    return codes & (_SOUND - 1)


def check_random_numbers(device: torch.device) -> None:
    """Raise RuntimeError where a kernel draws other random numbers than a CPU."""
    asked = torch.arange(100, device=device) << 40, *torch.arange(200, device=device).view(2, 100)
    found = gpu_kernels.random_numbers(*asked)
    with gpu_kernels.formulas():
        if not torch.equal(found.cpu(), gpu_kernels.random_numbers(*asked)):
            raise RuntimeError("the kernels draw other random numbers than PyTorch on this GPU")


@lru_cache(maxsize=1 << 17)
def _drawn(code: int) -> Drawn | None:
    return Drawn(code & (_SOUND - 1)) if code & _SOUND else None


def _kind(sampling: Sampling, ends: int) -> int:
    """How the graph draws with these settings; `ends`: how many tokens can end the text."""
    is_rare = (
        sampling.logit_bias
        or sampling.logprobs is not None
        or sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or (sampling.top_k or 0) > FIRST_RANKS
        or (sampling.min_new_tokens and ends > 1)
    )
    if is_rare:
        return _RARE
    if sampling.is_greedy:
        return _GREEDY
    return _RANKED if is_ranked(sampling) else _UNRANKED


def _put(drawn: list[Drawn | None], places: Sequence[int], others: Sequence[Drawn | None]) -> None:
    for place, other in zip(places, others, strict=True):
        drawn[place] = other


class GraphSampler:
    """Draws for up to S rows from logits (S, V), always read from the same memory.

    codes: (S,) int64, receives the tokens with flags, which `token_of` removes.
    """

    def __init__(self, logits: Tensor, codes: Tensor, graphs: Graphs) -> None:
        slots, width = logits.shape
        device = logits.device
        self._logits, self._codes, self._graphs = logits, codes, graphs
        self._asked = Mirror(len(_WHOLE) + len(_REAL), slots, device)
        self._inbox = Inbox(slots, device)
        numbers = self._asked.numbers[0]
        self._whole = dict(zip(_WHOLE, numbers, strict=False))
        self._real = dict(zip(_REAL, numbers[len(_WHOLE) :].view(np.float64), strict=True))
        # The graph draws for slots without a row as well, so they need valid settings.
        self._whole["top_k"][:] = 1
        self._real["temperature"][:] = 1.0
        # Not kept alive by this: a row may hold an adapter.
        self._held: list[ref[Row] | None] = [None] * slots
        # True for the tokens that each mask bans; mask 0 bans none.
        self._masks = torch.zeros(_MASKS, width, dtype=torch.bool, device=device)
        self._known: dict[Mask | None, int] = {None: 0}
        self._recorded: dict[tuple[int, bool, bool, bool], Callable[[], Tensor]] = {}

    @torch.no_grad()
    def draw(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        then: Callable[[], None] | None = None,
    ) -> list[Drawn | None]:
        """See `gptray.generation.sampling.draw`; logits: the first B rows, or a copy of them.

        then: queues more work before the host waits for the tokens, if this draw is sure to be
        final. It may overwrite the logits.
        """
        B = len(rows)
        if not B:
            return []
        if logits.data_ptr() != self._logits.data_ptr():
            self._logits[:B] = logits
        kinds = self._fill(rows)
        rare = [i for i, kind in enumerate(kinds) if kind == _RARE]
        if rare:
            rare_logits = self._logits[rare].float()  # before the graph overwrites them
        self._asked.send()
        key = self._key(kinds)
        result = self._graph(key)()
        self._inbox.expect(result)
        if then and not rare and key[0] <= _FEW_RANKS:
            then()
        codes = self._inbox.take()[:B]
        drawn = [_drawn(code) for code in codes]
        if rare:
            _put(drawn, rare, draw(rare_logits, [rows[i] for i in rare]))
        short = [i for i, code in enumerate(codes) if not code & _ENOUGH and kinds[i] != _RARE]
        if short:
            _put(drawn, short, draw(self._logits[short].float(), [rows[i] for i in short]))
        return drawn

    def _fill(self, rows: Sequence[Row]) -> list[int]:
        """Write the rows' settings where the next copy reads them; returns each row's kind."""
        B, held, whole = len(rows), self._held, self._whole
        self._asked.wait()
        for i, row in enumerate(rows):
            known = held[i]
            if known is None or known() is not row:
                held[i] = ref(row)
                self._fill_constants(i, row)
        whole["new_tokens"][:B] = new = [len(row.history) - row.prompt_tokens for row in rows]
        try:
            whole["mask"][:B] = [self._known[row.mask] for row in rows]
        except KeyError:
            whole["mask"][:B] = [self._mask_number(row.mask) for row in rows]
        whole["banned"][:B] = [
            row.ends[0] if count < row.sampling.min_new_tokens else -1
            for row, count in zip(rows, new, strict=True)
        ]
        kinds: list[int] = whole["kind"][:B].tolist()
        return kinds

    def _fill_constants(self, i: int, row: Row) -> None:
        """Write those of a row's settings that stay the same at every step."""
        sampling = row.sampling
        kind, k = _kind(sampling, len(row.ends)), 1
        if kind == _RANKED:
            V = self._logits.size(1)
            k = V if sampling.top_k is None else min(sampling.top_k, V)
        numbers = {"kind": kind, "top_k": k, "seed": sampling.seed, "row": row.sample}
        for name, number in numbers.items():
            self._whole[name][i] = number
        drawn = kind in (_RANKED, _UNRANKED)
        self._real["temperature"][i] = sampling.temperature if drawn else 1.0
        self._real["top_p"][i] = 1.0 if sampling.top_p is None else sampling.top_p
        self._real["min_p"][i] = sampling.min_p or 0.0

    def _mask_number(self, mask: Mask | None) -> int:
        """The row of `_masks` that holds a mask."""
        if mask is not None and mask not in self._known:
            number = self._known[mask] = len(self._known)
            if mask.banned is not None:
                self._masks[number, mask.banned] = True
            elif mask.allowed is not None:
                self._masks[number] = True
                self._masks[number, mask.allowed] = False
        return self._known[mask]

    def _key(self, kinds: Sequence[int]) -> tuple[int, bool, bool, bool]:
        """The arguments of `_draw` for rows of these kinds."""
        ranks = 0
        if _RANKED in kinds:
            # Other kinds have a top_k of 1.
            most = int(self._whole["top_k"][: len(kinds)].max())
            ranks = _FEW_RANKS if most <= _FEW_RANKS else FIRST_RANKS
        return ranks, _UNRANKED in kinds, _GREEDY in kinds, len(self._known) > 1

    def _graph(self, key: tuple[int, bool, bool, bool]) -> Callable[[], Tensor]:
        if key not in self._recorded:
            self._recorded[key] = self._graphs.recorded(lambda: self._draw(*key))
        return self._recorded[key]

    def _draw(self, ranks: int, has_unranked: bool, has_greedy: bool, has_masks: bool) -> Tensor:
        """Each row's token with its flags, (S,) int64. ranks: 0 if no row is ranked."""
        logits, asked = self._logits, dict(zip(_WHOLE, self._asked.sent, strict=False))
        columns = self._columns(asked)
        if has_masks:
            logits.masked_fill_(self._masks[asked["mask"]], float("-inf"))
        banned = asked["banned"][:, None]
        eos = logits.gather(1, banned.clamp(min=0))
        logits.scatter_(1, banned.clamp(min=0), torch.where(banned < 0, eos, float("-inf")))
        kind, enough = asked["kind"], torch.ones_like(asked["kind"], dtype=torch.bool)
        tokens, best = torch.zeros_like(kind), logits.new_zeros(len(kind))
        if ranks:
            beyond: slice | list[int] = slice(None) if ranks == FIRST_RANKS else []
            tokens, best, is_enough = draw_ranked(top_candidates, logits, columns, ranks, beyond)
            enough = is_enough | (kind != _RANKED)
        if has_unranked:
            unranked, best = draw_unranked(logits.float(), columns, has_min_p=True)
            tokens = torch.where(kind == _UNRANKED, unranked, tokens)
        if has_greedy:
            best, likeliest = logits.max(1)
            tokens = torch.where(kind == _GREEDY, likeliest, tokens)
        tokens = torch.where(torch.isfinite(best), tokens + _SOUND, 0)
        return self._codes.copy_(tokens + enough * _ENOUGH)

    def _columns(self, asked: dict[str, Tensor]) -> Columns:
        temperature, top_p, min_p = self._asked.sent[len(_WHOLE) :].view(torch.float64)[:, :, None]
        numbers = gpu_kernels.random_numbers(asked["seed"], asked["row"], asked["new_tokens"])
        return Columns(temperature, asked["top_k"][:, None], top_p, min_p, numbers[:, None])
