"""A task's work on one unit of the corpus: scan it, sample its training text, tokenise it.

Each is a function of the unit and its documents' labels; the job decides where it runs.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gptray.config import UserError
from gptray.data.boundary import first_boundary, short_words
from gptray.data.corpus import read_parts
from gptray.data.documents import EMPTY_ROW, Part
from gptray.data.encoding import UTF8
from gptray.data.pieces import Piece, file_encoding
from gptray.data.shards import Shard, ShardEncoder, ShardWriter
from gptray.data.sources import file_sha256
from gptray.data.split import SPLITS, TRAIN, UNUSED, Region
from gptray.data.split_plan import PiecePlan, PieceScan
from gptray.data.tokenizer import Tokenizer
from gptray.data.trust import UnreadableText

SAMPLE_CHARACTERS = 1 << 16
_DIGEST_BYTES = 8  # per document, to find repeated ones
# Markers that often separate documents. Left in the text, a model learns to write them.
MARKERS = (
    "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|startoftext|>", "<|im_start|>",
    "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "<bos>", "<eos>", "[BOS]", "[EOS]", "[SEP]", "[CLS]",
)  # fmt: skip
_MARKER_BEGINNINGS = "<|", "s>", "os>", "OS]", "[SEP]", "[CLS]"  # one of them is in every marker


@dataclass(frozen=True)
class UnitScan:
    """A unit's contents, and each file that begins in it: its sha256, and any unusual encoding."""

    pieces: list[PieceScan]
    sha256: dict[str, str]
    encodings: dict[str, str]  # of files whose byte order mark is not UTF-8's


def scan(unit: Sequence[Piece], *, alphabet: bool) -> UnitScan:
    """Read a unit once. Raises UserError at the first bad line."""
    pieces = [_scan_piece(piece, alphabet=alphabet) for piece in unit]
    begun = [piece for piece in unit if piece.start == 0]
    encodings = {
        piece.file.name: file_encoding(piece.file)
        for piece in begun
        if piece.file.format != "parquet" and piece.file.encoding is None
    }
    return UnitScan(
        pieces,
        {piece.file.name: file_sha256(piece.file) for piece in begun},
        {name: encoding for name, encoding in encodings.items() if encoding != UTF8},
    )


def _scan_piece(piece: Piece, *, alphabet: bool) -> PieceScan:
    sizes: list[int] = []
    characters: list[int] = []
    digests, digest = bytearray(), hashlib.blake2b(digest_size=_DIGEST_BYTES)
    empty_rows = chats = 0
    seen: set[str] = set()
    markers: Counter[str] = Counter()
    marked: dict[str, set[int]] = {}  # documents that hold each marker
    ended = True
    for part in read_parts(piece):
        if part == EMPTY_ROW:
            empty_rows += 1
            continue
        if ended:
            sizes.append(0)
            characters.append(0)
            digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            chats += part.is_chat
        raw = part.shown.encode()
        digest.update(raw)
        digests[_DIGEST_BYTES * (len(sizes) - 1) :] = digest.digest()
        sizes[-1] += len(raw)
        characters[-1] += len(part.text)
        ended = part.ends
        if alphabet:
            seen.update(part.text)
        for marker, count in () if part.is_chat else _markers(part.text):
            markers[marker] += count
            marked.setdefault(marker, set()).add(len(sizes))
    return PieceScan(
        bytes=np.array(sizes, np.int64),
        characters=np.array(characters, np.int64),
        digests=np.frombuffer(bytes(digests), np.uint64),
        empty_rows=empty_rows,
        ends=ended,
        alphabet="".join(sorted(seen)),
        markers={marker: (count, len(marked[marker])) for marker, count in markers.items()},
        chats=chats,
    )


def _markers(text: str) -> Iterator[tuple[str, int]]:
    if any(beginning in text for beginning in _MARKER_BEGINNINGS):
        yield from ((marker, n) for marker in MARKERS if (n := text.count(marker)))


def sample(unit: Sequence[PiecePlan], *, share: float, seed: int, number: int) -> list[str]:
    """Sample text of unit `number` to train a tokenizer on: its training split, or runs of it.

    The seed draws the runs, so that `share` of the text is spread over all documents. The whole
    split counts, whatever data.fraction is, so that losses of different fractions can be compared.
    Absurdly long words are cut, or training would take hours on them.
    """
    texts: list[str] = []
    for index, (label, part, _) in enumerate(_labelled(unit)):
        if label not in (TRAIN, UNUSED):
            continue
        if share >= 1:
            texts += short_words(part.text)
            continue
        for start, run in _runs(part.text):
            draw = hashlib.sha256(f"{seed} {number} {index} {start}".encode()).digest()
            if int.from_bytes(draw[:4], "big") < share * 2**32:
                texts += short_words(run)
    return texts


def _runs(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while start < len(text):
        least, most = start + SAMPLE_CHARACTERS, start + 2 * SAMPLE_CHARACTERS
        stop = first_boundary(text, least, most) or min(most, len(text))
        yield start, text[start:stop]
        start = stop


def tokenise(unit: Sequence[PiecePlan], *, folder: Path, number: int) -> dict[int, Shard]:
    """Write unit `number`'s shards into `folder`, using its `tokenizer/`; return them by label.

    There is one shard per split that has text in the unit.
    Raises UserError, naming the file, for text that the tokenizer cannot read.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this task has one core; others run in parallel
    encoder = _encoder(folder / "tokenizer")
    writers: dict[int, ShardWriter] = {}
    try:
        _write(unit, encoder, writers, folder=folder, number=number)
    except UnreadableText as error:
        files = (plan.piece.file for plan in unit if _holds(error.piece, plan.piece))
        raise UserError(f"{next(files).name}: {error}") from None
    return {label: w.shard for label, w in sorted(writers.items()) if w.shard is not None}


def _write(
    unit: Sequence[PiecePlan],
    encoder: ShardEncoder,
    writers: dict[int, ShardWriter],
    *,
    folder: Path,
    number: int,
) -> None:
    with ExitStack() as stack:
        latest = UNUSED
        for label, part, begins in _labelled(unit):
            if latest in writers and label != latest:
                writers[latest].break_off()
            latest = label
            if label == UNUSED:
                continue
            if label not in writers:
                path = folder / f"{SPLITS[label]}.{number:06d}.part"
                writers[label] = stack.enter_context(ShardWriter(path, encoder))
            writers[label].add(part.text, begins=begins, ends=part.ends, is_chat=part.is_chat)


def _holds(text: str, piece: Piece) -> bool:
    return any(text in part.text for part in read_parts(piece))


@lru_cache(maxsize=1)
def _encoder(folder: Path) -> ShardEncoder:
    """Cached, so that a process's next unit starts with the words already encoded."""
    return ShardEncoder(Tokenizer.load(folder))


def _labelled(unit: Sequence[PiecePlan]) -> Iterator[tuple[int, Part, bool]]:
    """Yield the unit's text in order, each run with its label and whether a document begins."""
    for plan in unit:
        document, position = 0, plan.first_character
        for part in read_parts(plan.piece):
            if part == EMPTY_ROW:
                continue
            if document in plan.cut:
                runs = _by_region(plan.cut[document], part, position)
            else:
                runs = iter([(int(plan.labels[document]), part)])
            begins = position == 0
            for label, run in runs:
                yield label, run, begins
                begins = False
            position += len(part.text)
            if part.ends:
                document, position = document + 1, 0


def _by_region(regions: Sequence[Region], part: Part, position: int) -> Iterator[tuple[int, Part]]:
    """Cut a part, which begins at character `position` of its document, into labelled runs."""
    done = 0
    for region in regions:
        stop = min(region.stop - position, len(part.text))
        if part.is_chat and done < stop < len(part.text):
            stop = _before_space(part.text, done, stop)
        if stop > done:
            # Only the document's own end gets an end-of-text token, not a cut.
            ends = part.ends and stop == len(part.text)
            yield region.label, Part(part.text[done:stop], ends, part.is_chat)
            done = stop


def _before_space(chat: str, start: int, stop: int) -> int:
    """Where to cut a chat near `stop`: before white space, so not in a special token's name."""
    left = max(chat.rfind(mark, start + 1, stop) for mark in " \n")
    right = [at for mark in " \n" if (at := chat.find(mark, stop)) >= 0]
    return left if left > start else min(right, default=stop)
