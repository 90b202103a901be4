"""Assigns documents, and the parts of documents that a border cuts, to train, val and test.

Pure functions of sizes, shares and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptray.config import UserError
from gptray.wording import count

SPLITS = ("train", "val", "test")
LONG_NAMES = {"train": "training", "val": "validation", "test": "test"}
WHOLE = ("test",)  # of a text that is not split
TRAIN, VAL, TEST = range(3)
UNUSED = 255  # training text beyond data.fraction
# The order of the splits along the text. Validation comes last, so that its beginning depends only
# on its own share, and 90:10 and 80:10:10 validate on the same text.
_LAYOUT = (TRAIN, TEST, VAL)
_SPLIT_STREAM = 1  # keeps this permutation apart from every other use of the seed
# A border moves to the nearest document edge if the distance is at most this share of the text, and
# a tenth of each neighbouring share.
_SLACK, _SLACK_OF_SHARE = 0.01, 0.1

Labels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


def split_names(parts: int) -> tuple[str, ...]:
    """The names of a text's splits; a text that is not split is test text."""
    return SPLITS[:parts] if parts > 1 else WHOLE


class Region(NamedTuple):
    """Consecutive characters of a document, up to `stop`, with one label (an index of SPLITS)."""

    stop: int
    label: int


@dataclass(frozen=True)
class Assignment:
    """Each document's label (an index of SPLITS, or UNUSED), and the regions of cut documents."""

    labels: Labels  # (documents,); a cut document has its first region's
    cut: dict[int, tuple[Region, ...]]

    def documents(self, label: int) -> int:
        """How many documents have text in a split; a cut one counts in each of its splits."""
        whole = int((self.labels == label).sum())
        starts = [regions[0].label for regions in self.cut.values()]
        parts = [region.label for regions in self.cut.values() for region in regions]
        return whole - starts.count(label) + parts.count(label)


def assign(
    sizes: Counts,
    characters: Counts,
    shares: Mapping[int, float],
    *,
    fraction: float = 1.0,
    seed: int,
) -> Assignment:
    """Assign documents of `sizes` bytes and `characters`, both of shape (documents,), to splits.

    The documents are laid out in a seeded permutation, and borders along it give each label its
    share of the bytes. A border moves to a document edge that is close; otherwise it cuts its
    document at int(characters * share of the document's bytes). Training subsets of growing
    `fraction` are nested, and leave validation and test unchanged.

    Raises UserError if a split would get less than one character.
    """
    labels = [label for label in _LAYOUT if label in shares]
    total = int(characters.sum())
    if any(share * total < 1 for share in shares.values()):
        raise UserError(
            f"data.split has {len(labels)} parts but the source has only "
            f"{count(total, 'character')}; "
            "give fewer parts or more text"
        )
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(sizes))
    line = _Line(sizes[order], characters[order])
    borders = _borders(line, [shares[label] for label in labels])
    for i in range(len(borders) - 2, 0, -1):  # no split stays empty
        borders[i] = min(max(borders[i], i), borders[i + 1] - 1)
    stops = list(zip(borders[1:], labels, strict=True))
    if fraction < 1 and labels[0] == TRAIN:
        used = min(max(line.fraction(fraction, borders[1]), 1), borders[1])
        rest = [(borders[1], UNUSED)] if used < borders[1] else []
        stops = [(used, TRAIN), *rest, *stops[1:]]
    return _assignment(line, order, stops)


class _Line:
    """Documents in a row, measured in bytes and in characters."""

    def __init__(self, sizes: Counts, characters: Counts) -> None:
        self.bytes = np.concatenate([[0], np.cumsum(sizes)])
        self.characters = np.concatenate([[0], np.cumsum(characters)])
        self.total = max(int(self.bytes[-1]), 1)

    def border(self, share: float, slack: float) -> tuple[int, float]:
        """The character where a border at this share of the bytes falls, and its actual share."""
        edge = self._nearest_edge(share * self.total)
        if abs(int(self.bytes[edge]) - share * self.total) <= slack * self.total:
            return int(self.characters[edge]), int(self.bytes[edge]) / self.total
        return self._inside(share), share

    def fraction(self, fraction: float, end: int) -> int:
        """The character that ends the first `fraction` of the text before character `end`.

        The slack depends on the nearest edge, so that a larger fraction never ends earlier.
        """
        share = fraction * self._share(end)
        edge = self._nearest_edge(share * self.total)
        reached = int(self.bytes[edge])
        slack = min(_SLACK * self.total, _SLACK_OF_SHARE * reached)
        if abs(reached - share * self.total) <= slack:
            return int(self.characters[edge])
        return self._inside(share)

    def _nearest_edge(self, at: float) -> int:
        right = min(int(np.searchsorted(self.bytes, at)), len(self.bytes) - 1)
        left = max(right - 1, 0)
        return left if at - self.bytes[left] <= self.bytes[right] - at else right

    def _inside(self, share: float) -> int:
        at = share * self.total
        place = int(np.searchsorted(self.bytes[1:-1], at, side="right"))
        start, stop = self.bytes[place : place + 2]
        first, last = self.characters[place : place + 2]
        # A lone document is cut at exactly its share, without rounding errors.
        part = share if stop - start == self.total else (at - start) / (stop - start)
        return int(first) + int(int(last - first) * part)

    def _share(self, character: int) -> float:
        """The share of the bytes before a character, assuming even characters in a document."""
        if len(self.bytes) == 2:
            return character / int(self.characters[-1])
        return float(np.interp(character, self.characters, self.bytes)) / self.total


def _borders(line: _Line, shares: Sequence[float]) -> list[int]:
    """The characters at which splits begin and end, in order."""
    end = int(line.characters[-1])
    if len(shares) == 1:
        return [0, end]
    *_, last = shares
    slack = min(_SLACK, _SLACK_OF_SHARE * last, _SLACK_OF_SHARE * (1 - last))
    border, share = line.border(1 - last, slack)
    if len(shares) == 2:
        return [0, border, end]
    # The middle split keeps its share even if the border behind it has moved.
    train, middle = shares[0] + (share - (1 - last)), shares[1]
    slack = min(_SLACK, _SLACK_OF_SHARE * middle, _SLACK_OF_SHARE * shares[0])
    first, _ = line.border(train if abs(train - shares[0]) > 1e-12 else shares[0], slack)
    return [0, first, border, end]


def _assignment(line: _Line, order: Counts, stops: Sequence[tuple[int, int]]) -> Assignment:
    """Labels in the documents' original order, from the splits' (end, label) along the line."""
    ends = np.array([stop for stop, _ in stops])
    names = np.array([label for _, label in stops], dtype=np.uint8)
    begin, end = line.characters[:-1], line.characters[1:]
    first = np.minimum(np.searchsorted(ends, begin, side="right"), len(ends) - 1)
    last = np.maximum(np.searchsorted(ends, end, side="left"), first)
    labels = np.empty(len(order), dtype=np.uint8)
    labels[order] = names[first]
    cut = {
        int(order[place]): tuple(
            Region(int(min(ends[part], end[place]) - begin[place]), int(names[part]))
            for part in range(first[place], last[place] + 1)
        )
        for place in np.flatnonzero(last > first)
    }
    return Assignment(labels, cut)
