"""Measures what a text loses when its tokens are decoded: bytes by kind, with examples.

Aligns the text and its decoded tokens from left to right in linear time: where they differ, both
resume at the nearest place where they agree again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gptray.data.data_manifest import LostEntry

# Each kind of difference, for messages.
KINDS = {
    "unknown": "unknown characters",
    "case": "changed case",
    "white_space": "white space",
    "other": "other changes",
}
EXAMPLES = 2  # of each kind
EXAMPLE_CHARACTERS = 24
# Marks an unknown token while texts are compared; a noncharacter, so no text has it.
_UNKNOWN = "\U0010fffe"
# Tried in turn: how many characters must agree to resume, and how far ahead to look for them.
_RESUMES = ((2, 6), (4, 32), (1, 32), (4, 1024))
# Differences to examine in a text; the rest of it is assumed to lose as much.
_MAX_DIFFERENCES = 10_000
# Differing texts of a shard are all compared up to this many characters, then every eighth.
_COMPARED_WHOLE, _EVERY = 1 << 20, 8


@dataclass
class Lost:
    """UTF-8 bytes that decoding does not restore, by kind, and examples: (kind, text, decoded).

    A stretch of text that decoding changes or drops counts its own bytes; a stretch that decoding
    adds counts the added bytes.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values())

    def add(self, other: Lost, *, times: int = 1) -> None:
        """Add another text's losses; keep the first examples of each kind."""
        self.kinds.update({kind: times * number for kind, number in other.kinds.items()})
        for example in other.examples:
            of_kind = [one for one in self.examples if one[0] == example[0]]
            if len(of_kind) < EXAMPLES and example not in of_kind:
                self.examples.append(example)

    @classmethod
    def joined(cls, parts: Iterable[Lost]) -> Lost:
        """The sum of several texts' losses."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def entry(self) -> LostEntry:
        """The losses for a manifest; `loses` puts them into words."""
        kinds = {kind: number for kind, number in self.kinds.most_common() if number}
        examples = sorted(self.examples, key=lambda one: list(kinds).index(one[0]))
        return {"kinds": kinds, "examples": [list(one) for one in examples]}


class Tally:
    """Adds up the losses of texts that differ from their decoded tokens.

    After _COMPARED_WHOLE characters it compares every eighth text and counts that as eight.
    """

    def __init__(self) -> None:
        self.lost = Lost()
        self._compared = self._texts = 0

    def compare(self, text: str, back: str, unknown: str | None) -> None:
        """Add the losses of one text, as `measure` finds them."""
        self._texts += 1
        is_part = self._compared >= _COMPARED_WHOLE
        if is_part and self._texts % _EVERY:
            return
        self._compared += len(text)
        self.lost.add(measure(text, back, unknown), times=_EVERY if is_part else 1)


def loses(entry: LostEntry, num_bytes: int) -> str:
    """Say what a tokenizer loses of `num_bytes` of text; "" if it loses nothing."""
    kinds = entry["kinds"]
    if not kinds:
        return ""
    shares = ", ".join(f"{KINDS[kind]} {percent(kinds[kind] / num_bytes)}" for kind in kinds)
    examples = entry["examples"]
    if len(kinds) > 1:
        examples = list({kind: [kind, *rest] for kind, *rest in reversed(examples)}.values())[::-1]
    shown = ", ".join(f"{text!r} -> {back!r}" for _, text, back in examples)
    share = min(1.0, sum(kinds.values()) / num_bytes)
    return f"the tokenizer loses {percent(share)} of the text ({shares}), such as {shown}"


def percent(share: float) -> str:
    """A share above 0 as a readable percentage."""
    return "less than 0.1%" if share < 0.0005 else f"{100 * share:.1f}%"


def measure(text: str, back: str, unknown: str | None) -> Lost:
    """Compare `text` with `back`, the decoded tokens; `unknown` is the unknown token's name."""
    if unknown and unknown not in text:
        back = back.replace(unknown, _UNKNOWN)
    lost, shown = Lost(), Counter[str]()
    for number, (start, stop, back_start, back_stop) in enumerate(_differences(text, back)):
        if number == _MAX_DIFFERENCES:
            scale = len(text) / max(start, 1)
            lost.kinds = Counter({one: round(scale * lost.kinds[one]) for one in lost.kinds})
            break
        gone, came = text[start:stop], back[back_start:back_stop]
        kind = _kind(gone, came)
        if kind == "case" and len(gone) == len(came):
            gone = "".join(a for a, b in zip(gone, came, strict=True) if a != b)
        lost.kinds[kind] += len((gone or came).encode())
        if shown[kind] < EXAMPLES:
            spaces = kind == "white_space"
            word = _shown(back, back_start, back_stop, spaces=spaces)
            word = word.replace(_UNKNOWN, unknown or _UNKNOWN)
            example = (kind, _shown(text, start, stop, spaces=spaces), word)
            if example not in lost.examples:
                lost.examples.append(example)
                shown[kind] += 1
    return lost


def _kind(gone: str, came: str) -> str:
    if not gone.strip() and not came.strip():
        return "white_space"
    if gone.casefold() == came.casefold():
        return "case"
    return "unknown" if not came.strip() or _UNKNOWN in came else "other"


def _shown(text: str, start: int, stop: int, *, spaces: bool) -> str:
    """A stretch with the rest of its word, or white space with some context."""
    low, high = max(0, start - EXAMPLE_CHARACTERS), stop + EXAMPLE_CHARACTERS
    if spaces:
        return text[max(0, start - 4) : stop + 4]
    before, after = text[low:start], text[stop:high]
    first = max((before.rfind(space) for space in " \n\t"), default=-1) + 1
    ends = [at for at in (after.find(space) for space in " \n\t") if at >= 0]
    return (before[first:] + text[start:stop] + after[: min(ends, default=len(after))])[
        :EXAMPLE_CHARACTERS
    ]


def _differences(text: str, back: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield every stretch that differs, in order: its start and stop in both texts."""
    i = j = 0
    while True:
        same = _agreeing(text, i, back, j)
        i, j = i + same, j + same
        if i == len(text) and j == len(back):
            return
        more, back_more = _resume(text, i, back, j)
        yield i, i + more, j, j + back_more
        i, j = i + more, j + back_more


def _agreeing(text: str, i: int, back: str, j: int) -> int:
    """How many characters agree from `i` and `j` on, by a galloping search."""
    begin, size = i, 8
    while (block := text[i : i + size]) and block == back[j : j + size]:
        i, j = i + len(block), j + len(block)
        size = min(4 * size, 1 << 16)
    while size := size // 2:
        if (block := text[i : i + size]) and block == back[j : j + size]:
            i, j = i + len(block), j + len(block)
    return i - begin


def _resume(text: str, i: int, back: str, j: int) -> tuple[int, int]:
    """How far to skip in each so that they agree again, with the least sum."""
    if i == len(text) or j == len(back):
        return len(text) - i, len(back) - j
    if near := _resume_at_once(text, i, back, j):
        return near
    for anchor, reach in _RESUMES:
        window = back[j : j + reach + anchor]
        found = (reach, reach + 1)
        for more in range(min(reach, len(text) - i - anchor) + 1):
            if more >= sum(found):
                break
            at = window.find(text[i + more : i + more + anchor])
            if at >= 0 and more + at < sum(found):
                found = more, at
        if sum(found) <= 2 * reach:
            return found
    left, back_left, far = len(text) - i, len(back) - j, _RESUMES[-1][1]
    if left <= far:
        return left, back_left
    return far, min(back_left, round(back_left * far / left))


def _resume_at_once(text: str, i: int, back: str, j: int) -> tuple[int, int] | None:
    """A shortcut for one differing character or an unknown token: most differences."""
    here, there, after, after_there = text[i], back[j], text[i + 1 : i + 3], back[j + 1 : j + 3]
    if after == after_there:
        return 1, 1
    if there == " " and after_there.startswith(here):
        return 0, 1
    if here.isspace() and after.startswith(there):
        return 1, 0
    if there == _UNKNOWN and after_there and after_there[0] != _UNKNOWN:
        # It stands for the text before the next character that was decoded.
        at = text.find(after_there[0], i + 1, i + 64)
        if at >= 0:
            return at - i, 1
    return None
