from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np

from gptray.data.data_manifest import DataManifest
from gptray.data.pieces import Piece, Reading, plan_pieces
from gptray.data.shares import (
    marker_warning,
    repeat_warnings,
    separator_warning,
    share_warnings,
    split_rows,
)
from gptray.data.sources import SourceFile, find_files
from gptray.data.split import TRAIN, VAL
from gptray.data.split_plan import PiecePlan, PieceScan, ScannedText, plan_split
from gptray.data.work import scan as scan_unit


def scan(**markers: tuple[int, int]) -> PieceScan:
    none = np.array([], np.int64)
    return PieceScan(
        none,
        none,
        none.astype(np.uint64),
        0,
        True,
        markers={f"<|{n}|>": c for n, c in markers.items()},
    )


def test_markers_are_counted_over_pieces_and_the_key_is_named() -> None:
    text = marker_warning([scan(endoftext=(3, 1), im_end=(1, 1)), scan(endoftext=(2, 2))],
                          splits_text=True)  # fmt: skip
    assert text is not None
    assert "<|endoftext|> 5 times in 3 documents, <|im_end|> 1 time in 1 document;" in text
    assert "data.separator='<|endoftext|>'" in text
    rows = marker_warning([scan(endoftext=(1, 1))], splits_text=False)
    assert rows is not None and "data.separator" not in rows
    assert marker_warning([scan()], splits_text=True) is None


def test_a_separator_that_splits_nothing_is_a_warning() -> None:
    def plan(name: str, documents: int) -> PiecePlan:
        piece = Piece(SourceFile(name, 9, 0), 0, 9, Reading(separator="\n\n"))
        return PiecePlan(piece, np.zeros(documents, np.uint8), {}, 0)

    unsplit = [plan("a.txt", 1), plan("b.txt", 1), plan("c.jsonl", 7)]
    said = separator_warning("\n\n", unsplit)
    assert said is not None and r"data.separator='\n\n' does not split any text file" in said
    typed = separator_warning("\\n\\n", unsplit)
    assert typed and "in a shell write $'\\n\\n'" in typed
    assert separator_warning("\n\n", [*unsplit, plan("b.txt", 1)]) is None
    assert separator_warning("\n\n", [plan("c.jsonl", 7)]) is None
    assert separator_warning(None, unsplit) is None


def repeats(path: Path, texts: list[str], *, val: list[str] | None = None) -> list[str]:
    """What is said of repetitions in a text, nine tenths of which are trained on unless `val`."""
    scanned: list[ScannedText] = []
    scans: list[PieceScan] = []
    shares = [{TRAIN: 0.9, VAL: 0.1}] if val is None else [{TRAIN: 1.0}, {VAL: 1.0}]
    for share, rows in zip(shares, [texts, val or []], strict=False):
        file = path / f"{len(scanned)}.jsonl"
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        units = plan_pieces(find_files(str(file)), Reading(), piece_bytes=500, cut_text=True)
        pieces = [scan_unit(unit, alphabet=False).pieces for unit in units]
        scanned.append(ScannedText(units, pieces, share))
        scans += [piece for unit in pieces for piece in unit]
    plan = plan_split(scanned, fraction=0.5, seed=1)
    return repeat_warnings([piece for unit in plan.units for piece in unit], scans)


def test_validation_text_that_repeats_training_text_is_a_warning(tmp_path: Path) -> None:
    texts = [f"This is row number {number} of them all." for number in range(100)]
    assert repeats(tmp_path, texts) == []
    assert repeats(tmp_path, ["One long text. " * 90]) == []
    (warning,) = repeats(tmp_path, ["The same."] * 100)
    assert warning.startswith("100% of the validation text repeats documents of the training text")
    (warning,) = repeats(tmp_path, texts, val=texts[:6] + [text.upper() for text in texts[:6]])
    assert warning.startswith("50% of the validation text")
    assert repeats(tmp_path, texts, val=texts[:1] + [text.upper() for text in texts]) == []


def test_share_that_is_off_by_a_fifth_is_a_warning() -> None:
    asked = {"train": 0.8, "val": 0.1, "test": 0.1}
    assert share_warnings(asked, {"train": 800, "val": 110, "test": 90}) == []
    (warning,) = share_warnings(asked, {"train": 800, "val": 125, "test": 95})
    assert warning.startswith("the validation split has 12.3% of the text, but data.split asks")
    (small,) = share_warnings({"train": 0.9999, "val": 0.0001}, {"train": 23_397, "val": 3})
    assert small.endswith("split has 0.0128% of the text, but data.split asks for 0.01%")


def test_rows_say_documents_bytes_and_tokens() -> None:
    manifest = {
        "bytes": 4_000_000,
        "splits": {
            "train": {"documents": 1, "bytes": 3_600_000, "tokens": 1_000_000},
            "val": {"documents": 2, "bytes": 400_000, "tokens": 1_234},
            "test": {"documents": 1, "bytes": 2, "tokens": 1},
        },
    }
    assert split_rows(cast(DataManifest, manifest)) == [
        ("train", "1 document, 3.6 MB (90.0%), 1,000,000 tokens"),
        ("val", "2 documents, 400.0 kB (10.0%), 1,234 tokens"),
        ("test", "1 document, 2 bytes (0.0%), 1 token"),
    ]
