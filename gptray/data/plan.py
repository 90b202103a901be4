"""From counts to a plan: which piece of the corpus holds which documents, and where they go.

Pure: the counts come from `work.scan`, the rule from `split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptray.config import UserError
from gptray.data.corpus import Piece
from gptray.data.split import TRAIN, UNUSED, Labels, Region, assign_documents, assign_positions


@dataclass(frozen=True)
class PieceScan:
    """What a piece holds. Its first document may come from, its last go on into, a neighbour."""

    bytes: npt.NDArray[np.int64]  # UTF-8 bytes of each document
    characters: int
    empty_rows: int
    ends: bool  # whether the last document ends here
    alphabet: str  # its characters, where asked for


@dataclass(frozen=True)
class PiecePlan:
    """A piece and where its text goes: a label per document, or regions of the only document."""

    piece: Piece
    labels: Labels | None
    regions: tuple[Region, ...] = ()
    first_character: int = 0  # of the piece, in the only document


@dataclass(frozen=True)
class SplitPlan:
    """The whole corpus, unit by unit, with its documents counted."""

    units: list[list[PiecePlan]]
    by: str  # document or position
    documents: list[int]  # per split; a document that is cut counts in each
    total_documents: int
    total_bytes: int
    train_bytes: int  # of the whole split; exact by document, nearly so by position


def plan_split(
    units: Sequence[Sequence[Piece]],
    scans: Sequence[Sequence[PieceScan]],
    *,
    split: Sequence[float],
    fraction: float,
    seed: int,
    key: str = "data.source",
) -> SplitPlan:
    """Send every document, or every part of the only one, to its split.

    `key` is the config's name for the source, in messages.
    Raises UserError when there is no text, or too little for so many splits.
    """
    flat = [scan for unit in scans for scan in unit]
    firsts, sizes = _documents(flat)
    if not len(sizes):
        raise UserError(f"{key}: there is no text in it")
    if len(sizes) == 1:
        return _by_position(units, flat, sizes, split=split, fraction=fraction)
    labels = assign_documents(sizes, split, fraction=fraction, seed=seed)
    pieces = iter(zip(flat, firsts, strict=True))
    plans: list[list[PiecePlan]] = []
    for unit in units:
        plans.append([])
        for piece in unit:
            scan, first = next(pieces)
            plans[-1].append(PiecePlan(piece, labels[first : first + len(scan.bytes)]))
    return SplitPlan(
        plans,
        "document",
        [int((labels == label).sum()) for label in range(len(split))],
        len(sizes),
        int(sizes.sum()),
        int(sizes[np.isin(labels, (TRAIN, UNUSED))].sum()),
    )


def _by_position(
    units: Sequence[Sequence[Piece]],
    scans: Sequence[PieceScan],
    sizes: npt.NDArray[np.int64],
    *,
    split: Sequence[float],
    fraction: float,
) -> SplitPlan:
    characters = sum(scan.characters for scan in scans)
    regions = tuple(assign_positions(characters, split, fraction=fraction))
    position = 0
    counts = iter(scans)
    plans: list[list[PiecePlan]] = []
    for unit in units:
        plans.append([])
        for piece in unit:
            plans[-1].append(PiecePlan(piece, None, regions, position))
            position += next(counts).characters
    total = int(sizes.sum())
    return SplitPlan(plans, "position", [1] * len(split), 1, total, int(total * split[0]))


def _documents(scans: Sequence[PieceScan]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Index of each piece's first document in the corpus, and every document's bytes."""
    firsts = []
    total = 0
    goes_on = False
    for scan in scans:
        firsts.append(total - goes_on)
        if len(scan.bytes):
            total = firsts[-1] + len(scan.bytes)
            goes_on = not scan.ends
    sizes = np.zeros(total, np.int64)
    for first, scan in zip(firsts, scans, strict=True):
        sizes[first : first + len(scan.bytes)] += scan.bytes
    return firsts, sizes
