"""Masks that keep generated text valid UTF-8, so that no character comes out broken.

A byte token (byte-level BPE, SentencePiece's byte fallback) may be only part of a character. Each
row carries the state of an automaton that reads UTF-8. A token is allowed if its bytes lead to a
state from which the tokens left can complete the character. Each state's mask is built once.

The automaton is RFC 3629's, without surrogates and overlong forms. It also rejects U+FFFD itself,
which marks a broken character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptray.data.roundtrip import pieces
from gptray.data.tokenizer import Tokenizer

# Between two characters; after bytes that are not UTF-8.
START, INVALID = 0, 10
# Edges: state, first and last byte, next state. States 1 and 2 need that many more bytes; the
# others, named after the bytes read, restrict the next byte.
_AFTER_E0, _AFTER_ED, _AFTER_EF, _AFTER_EF_BF, _AFTER_F0, _AFTER_F1, _AFTER_F4 = range(3, 10)
_EDGES = (
    (START, 0x00, 0x7F, START), (START, 0xC2, 0xDF, 1), (START, 0xE1, 0xEE, 2),
    (START, 0xE0, 0xE0, _AFTER_E0), (START, 0xED, 0xED, _AFTER_ED), (START, 0xEF, 0xEF, _AFTER_EF),
    (START, 0xF0, 0xF0, _AFTER_F0), (START, 0xF1, 0xF3, _AFTER_F1), (START, 0xF4, 0xF4, _AFTER_F4),
    (1, 0x80, 0xBF, START), (2, 0x80, 0xBF, 1),
    (_AFTER_E0, 0xA0, 0xBF, 1), (_AFTER_ED, 0x80, 0x9F, 1),
    (_AFTER_EF, 0x80, 0xBE, 1), (_AFTER_EF, 0xBF, 0xBF, _AFTER_EF_BF),
    (_AFTER_EF_BF, 0x80, 0xBF, START), (_AFTER_EF_BF, 0xBD, 0xBD, INVALID),
    (_AFTER_F0, 0x90, 0xBF, 2), (_AFTER_F1, 0x80, 0xBF, 2), (_AFTER_F4, 0x80, 0x8F, 2),
)  # fmt: skip
# The most bytes, so also the most tokens, of a character.
_LONGEST = 4

States = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Mask:
    """The tokens that a row may draw; rows in the same state share a mask.

    Between characters few tokens are banned, inside one nearly all. Only the shorter of the two
    lists of ids is stored, in ascending order; the other is None.
    """

    banned: Tensor | None
    allowed: Tensor | None

    @classmethod
    def of(cls, is_allowed: NDArray[np.bool_], device: torch.device) -> Mask:
        banned, allowed = (
            torch.from_numpy(np.flatnonzero(one)).to(device) for one in (~is_allowed, is_allowed)
        )
        return cls(banned, None) if len(banned) <= len(allowed) else cls(None, allowed)


class Utf8:
    """The automaton over a vocabulary of tokens. is_needed: whether it ever bans one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        self._pieces = pieces(tokenizer)[:vocab_size]
        self._device = device
        states = np.repeat(np.arange(INVALID + 1, dtype=np.uint8)[:, None], vocab_size, axis=1)
        states[:, : len(self._pieces)] = _transitions(tokenizer)[:, :vocab_size]
        # A text may end only between characters. Tokens that the tokenizer lacks add no bytes.
        self._is_end = np.arange(vocab_size) == tokenizer.eos_id
        states[:, self._is_end] = INVALID
        states[START, self._is_end] = START
        self.is_needed = bool((states[START] != START).any())
        self._states = states
        self._next = [row.tobytes() for row in states]
        self._distance = _distances(states)
        self._masks: dict[tuple[int, int], Mask | None] = {}

    def next(self, state: int, token: int) -> int:
        """The state after a token; INVALID after one that breaks a character."""
        following: int = self._next[state][token]
        return following

    def open_end(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The tokens of an incomplete character at the end, from the one in which it begins.

        Returns them with the state after them; none, and START, if there is no such character.
        """
        end = b""
        for count in range(1, min(len(tokens), _LONGEST) + 1):
            token = tokens[-count]
            end = (self._pieces[token] if token < len(self._pieces) else b"") + end
            begin = next((i for i in range(1, len(end) + 1) if end[-i] & 0xC0 != 0x80), None)
            if begin is not None:
                state = _read(end[-begin:])
                is_open = begin < _LONGEST and state not in (START, INVALID)
                return (list(tokens[-count:]), state) if is_open else ([], START)
        return [], START

    def mask(self, state: int, left: int) -> Mask | None:
        """What may be drawn in a state if at most `left` tokens can follow.

        None if every token may be drawn, or no token but end-of-text.
        """
        key = state, min(max(left, 0), _LONGEST - 1)
        if key not in self._masks:
            is_allowed = self._distance[self._states[state]] <= key[1]
            useless = is_allowed.all() or not (is_allowed & ~self._is_end).any()
            self._masks[key] = None if useless else Mask.of(is_allowed, self._device)
        return self._masks[key]


def _table() -> States:
    """The state after each byte, (states, 256)."""
    table = np.full((INVALID + 1, 256), INVALID, np.uint8)
    for state, first, last, target in _EDGES:
        table[state, first : last + 1] = target
    return table


_TABLE = _table()


def _read(text: bytes) -> int:
    state = START
    for byte in text:
        state = int(_TABLE[state, byte])
    return state


@lru_cache(maxsize=2)
def _transitions(tokenizer: Tokenizer) -> States:
    """The state after each token's bytes, (states, tokens)."""
    given = pieces(tokenizer)
    lengths = np.array([len(piece) for piece in given])
    order = np.argsort(-lengths, kind="stable")  # longest first: those with bytes left lead
    joined = np.frombuffer(b"".join(given), np.uint8)
    starts = (np.cumsum(lengths) - lengths)[order]
    states = np.repeat(np.arange(INVALID + 1, dtype=np.uint8)[:, None], len(given), axis=1)
    for place in range(int(lengths.max(initial=0))):
        count = int((lengths > place).sum())
        states[:, :count] = _TABLE[states[:, :count], joined[starts[:count] + place]]
    found = np.empty_like(states)
    found[:, order] = states
    return found


def _distances(states: States) -> NDArray[np.int64]:
    """The fewest tokens that complete each state's character; a huge number if none can."""
    never = 1 << 30
    distance = np.full(INVALID + 1, never)
    distance[START] = 0
    for _ in range(_LONGEST):
        nearest = distance[states].min(axis=1) + 1
        distance[1:INVALID] = np.minimum(distance, nearest)[1:INVALID]
    return distance
