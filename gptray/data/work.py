"""What a task does with one unit of the corpus: scan it, sample its training text, tokenise it.

Each is a function of the unit and of its documents' labels; running them anywhere is the runner's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gptray.config import UserError
from gptray.data.boundary import first_boundary
from gptray.data.corpus import EMPTY_ROW, Part, Piece, read_parts
from gptray.data.plan import PiecePlan, PieceScan
from gptray.data.shards import Shard, ShardEncoder, ShardWriter
from gptray.data.sources import file_sha256
from gptray.data.split import SPLITS, TRAIN, UNUSED, Labels
from gptray.data.tokenizer import Tokenizer, UnreadableText

SAMPLE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class UnitScan:
    """What a unit holds, and the sha256 of every file that begins in it."""

    pieces: list[PieceScan]
    sha256: dict[str, str]


def scan(unit: Sequence[Piece], text_column: str, *, alphabet: bool) -> UnitScan:
    """Read a unit through once. Raises UserError at the first bad line."""
    pieces = [_scan_piece(piece, text_column, alphabet=alphabet) for piece in unit]
    begun = [piece.file for piece in unit if piece.start == 0]
    return UnitScan(pieces, {file.name: file_sha256(file) for file in begun})


def _scan_piece(piece: Piece, text_column: str, *, alphabet: bool) -> PieceScan:
    sizes: list[int] = []
    characters = empty_rows = 0
    seen: set[str] = set()
    ended = True
    for part in read_parts(piece, text_column):
        if part == EMPTY_ROW:
            empty_rows += 1
            continue
        if ended:
            sizes.append(0)
        sizes[-1] += len(part.text.encode())
        characters += len(part.text)
        ended = part.ends
        if alphabet:
            seen.update(part.text)
    return PieceScan(
        np.array(sizes, np.int64), characters, empty_rows, ended, "".join(sorted(seen))
    )


def sample(
    unit: Sequence[PiecePlan], text_column: str, *, share: float, seed: int, number: int
) -> list[str]:
    """Unit `number`'s text to train a tokenizer on: all of its training split, or runs of it.

    Runs are drawn by the seed, so that `share` of the text is spread over all documents. The split
    counts whole, whatever fraction of it is used: losses of different fractions then compare.
    """
    texts = []
    for index, (label, part) in enumerate(_labelled(unit, text_column)):
        if label not in (TRAIN, UNUSED):
            continue
        if share >= 1:
            texts.append(part.text)
            continue
        for start, run in _runs(part.text):
            draw = hashlib.sha256(f"{seed} {number} {index} {start}".encode()).digest()
            if int.from_bytes(draw[:4], "big") < share * 2**32:
                texts.append(run)
    return texts


def _runs(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while start < len(text):
        stop = first_boundary(text, start + SAMPLE_CHARACTERS) or len(text)
        yield start, text[start:stop]
        start = stop


def tokenise(
    unit: Sequence[PiecePlan], text_column: str, *, folder: Path, number: int
) -> dict[int, Shard]:
    """Write unit `number`'s shards into `folder`, by its `tokenizer/`, and describe them by label.

    There is one per split that has text in the unit.
    Raises UserError for text that the tokenizer cannot read, naming its file.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this task has one core; others run beside it
    encoder = _encoder(folder / "tokenizer")
    writers: dict[int, ShardWriter] = {}
    try:
        _write(unit, text_column, encoder, writers, folder=folder, number=number)
    except UnreadableText as error:
        name = _file_with(error.piece, unit, text_column)
        raise UserError(f"{name}: {error}") from None
    return {label: w.shard for label, w in sorted(writers.items()) if w.shard is not None}


def _write(
    unit: Sequence[PiecePlan],
    text_column: str,
    encoder: ShardEncoder,
    writers: dict[int, ShardWriter],
    *,
    folder: Path,
    number: int,
) -> None:
    with ExitStack() as stack:
        for label, part in _labelled(unit, text_column):
            if label == UNUSED:
                continue
            if label not in writers:
                path = folder / f"{SPLITS[label]}.{number:06d}.part"
                writers[label] = stack.enter_context(ShardWriter(path, encoder))
            writers[label].add(part.text, ends=part.ends)


def _file_with(piece: str, unit: Sequence[PiecePlan], text_column: str) -> str:
    """The name of the first of a unit's files that has a piece of text."""
    for plan in unit:
        if any(piece in text for text, _ in read_parts(plan.piece, text_column)):
            return plan.piece.file.name
    raise AssertionError(piece)


@lru_cache(maxsize=1)
def _encoder(folder: Path) -> ShardEncoder:
    """Kept from one unit to the next in the same process, with the words that it knows by then."""
    return ShardEncoder(Tokenizer.load(folder))


def _labelled(unit: Sequence[PiecePlan], text_column: str) -> Iterator[tuple[int, Part]]:
    """The unit's text in order, each run with its label."""
    for plan in unit:
        parts = (p for p in read_parts(plan.piece, text_column) if p != EMPTY_ROW)
        if plan.labels is None:
            labelled = _by_position(plan, parts)
        else:
            labelled = _by_document(plan.labels, parts)
        yield from labelled


def _by_document(labels: Labels, parts: Iterator[Part]) -> Iterator[tuple[int, Part]]:
    document = 0
    for part in parts:
        yield int(labels[document]), part
        document += part.ends


def _by_position(plan: PiecePlan, parts: Iterator[Part]) -> Iterator[tuple[int, Part]]:
    base = plan.first_character
    for text, ends in parts:
        done = 0
        for region in plan.regions:
            stop = min(region.stop - base, len(text))
            if stop > done:
                # Only the document's own end gets an end of text; a cut is no end.
                at_end = ends and region == plan.regions[-1]
                yield region.label, Part(text[done:stop], at_end)
                done = stop
        base += len(text)
