"""Turns counts into a plan: which documents each piece of the corpus holds, and their splits.

Pure functions: `work.scan` counts, `split` assigns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from gptray.config import UserError
from gptray.data.pieces import Piece
from gptray.data.split import TRAIN, UNUSED, Assignment, Counts, Digests, Labels, Region, assign


@dataclass(frozen=True)
class PieceScan:
    """The contents of a piece; its first and last document may extend into neighbours."""

    bytes: Counts  # UTF-8 bytes of each document, (documents,)
    characters: Counts  # of each document, (documents,)
    digests: Digests  # of each document's text in the piece, (documents,)
    empty_rows: int
    ends: bool  # whether the last document ends here
    alphabet: str = ""  # its distinct characters, if asked for
    markers: dict[str, tuple[int, int]] = field(default_factory=dict)  # occurrences, documents
    chats: int = 0  # documents that a chat template wrote


@dataclass(frozen=True)
class ScannedText:
    """One source of the corpus, such as data.source, and its shares."""

    units: Sequence[Sequence[Piece]]
    scans: Sequence[Sequence[PieceScan]]  # one per piece of each unit
    shares: Mapping[int, float]  # by label; they add up to 1
    key: str = "data.source"  # the config's name for it, in messages


@dataclass(frozen=True)
class PiecePlan:
    """A piece and the splits of its text: a label per document, and regions of cut documents.

    Documents count from the piece's first, a document's characters from its beginning.
    """

    piece: Piece
    labels: Labels
    cut: dict[int, tuple[Region, ...]]
    first_character: int  # where the piece begins in its first document


@dataclass(frozen=True)
class SplitPlan:
    """The plan of the whole corpus, unit by unit, with its counts."""

    units: list[list[PiecePlan]]
    documents: list[int]  # per split; a cut document counts in each of its splits
    cut_documents: int
    total_documents: int
    total_bytes: int
    train_bytes: int  # of the whole training split; estimated for cut documents


def plan_split(texts: Sequence[ScannedText], *, fraction: float, seed: int) -> SplitPlan:
    """Assign every document, or every region of one, to a split.

    Raises UserError if a source holds no text, or too little for so many splits.
    """
    units: list[list[PiecePlan]] = []
    labels = max(label for text in texts for label in text.shares) + 1
    documents = [0] * labels
    cut = total = total_bytes = train_bytes = 0
    for text in texts:
        scans = list(chain.from_iterable(text.scans))
        firsts, sizes, characters = _documents(scans)
        if not len(sizes):
            raise UserError(f"{text.key} holds no text")
        assigned = assign(sizes, characters, text.shares, fraction=fraction, seed=seed)
        units += _piece_plans(text.units, scans, firsts, assigned)
        documents = [documents[label] + assigned.documents(label) for label in range(labels)]
        cut += len(assigned.cut)
        total += len(sizes)
        total_bytes += int(sizes.sum())
        train_bytes += _train_bytes(assigned, sizes, characters)
    return SplitPlan(units, documents, cut, total, total_bytes, train_bytes)


def _piece_plans(
    units: Sequence[Sequence[Piece]],
    scans: Sequence[PieceScan],
    firsts: Sequence[int],
    assigned: Assignment,
) -> list[list[PiecePlan]]:
    plans: list[list[PiecePlan]] = []
    pieces = iter(zip(scans, firsts, strict=True))
    before = 0  # characters of the document that continues in the next piece
    for unit in units:
        plans.append([])
        for piece in unit:
            scan, first = next(pieces)
            count = len(scan.bytes)
            cut = {
                document - first: regions
                for document, regions in assigned.cut.items()
                if first <= document < first + count
            }
            plans[-1].append(PiecePlan(piece, assigned.labels[first : first + count], cut, before))
            if count:
                goes_on = 0 if scan.ends else int(scan.characters[-1])
                before = goes_on + (before if count == 1 and not scan.ends else 0)
    return plans


def _train_bytes(assigned: Assignment, sizes: Counts, characters: Counts) -> int:
    total = int(sizes[np.isin(assigned.labels, (TRAIN, UNUSED))].sum())
    for document, regions in assigned.cut.items():
        if regions[0].label in (TRAIN, UNUSED):
            total -= int(sizes[document])
        start = 0
        for region in regions:
            if region.label in (TRAIN, UNUSED):
                share = (region.stop - start) / int(characters[document])
                total += int(sizes[document] * share)
            start = region.stop
    return total


def _documents(scans: Sequence[PieceScan]) -> tuple[list[int], Counts, Counts]:
    """The index of each piece's first document; every document's bytes and characters."""
    firsts = []
    total = 0
    goes_on = False
    for scan in scans:
        firsts.append(total - goes_on)
        if len(scan.bytes):
            total = firsts[-1] + len(scan.bytes)
            goes_on = not scan.ends
    sizes, characters = np.zeros(total, np.int64), np.zeros(total, np.int64)
    for first, scan in zip(firsts, scans, strict=True):
        sizes[first : first + len(scan.bytes)] += scan.bytes
        characters[first : first + len(scan.characters)] += scan.characters
    return firsts, sizes, characters
