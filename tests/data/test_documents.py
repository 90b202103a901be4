"""Separators: the documents are those of `str.split`, wherever pieces and blocks begin."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from gptray.data.corpus import read_parts
from gptray.data.documents import split_documents
from gptray.data.pieces import Reading, plan_pieces
from gptray.data.sources import find_files
from tests.data.texts import CHINESE, EMOJI, ENGLISH, KOREAN, write_bytes

TEXTS = [KOREAN, ENGLISH, "x", "  led and trailed \n\n", CHINESE * 9, "", " \n ", EMOJI, "end"]


def documents(path: Path, separator: str, *, piece_bytes: int = 1 << 20) -> list[str]:
    reading = Reading(separator=separator)
    out = [""]
    for unit in plan_pieces(
        find_files(str(path)), reading, piece_bytes=piece_bytes, cut_text=False
    ):
        for piece in unit:
            for part in read_parts(piece):
                assert part.text
                out[-1] += part.text
                if part.ends:
                    out.append("")
            assert out[-1] == "", "a document ends in its piece"
    return out[:-1]


def expected(text: str, separator: str) -> list[str]:
    return [one.strip() for one in text.split(separator) if one.strip()]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "---", "다", "\n%\n"])
@pytest.mark.parametrize("piece_bytes", [1, 3, 64, 1 << 20])
def test_pieces_hold_the_documents_of_the_whole(
    tmp_path: Path, separator: str, piece_bytes: int
) -> None:
    text = separator.join(TEXTS) + "a-----b------c" + separator
    path = write_bytes(tmp_path / "t.txt", text.encode())
    assert documents(path, separator, piece_bytes=piece_bytes) == expected(text, separator)


@pytest.mark.parametrize("block", range(1, 20))
def test_separator_that_straddles_blocks_is_found(block: int) -> None:
    text = "one <|sep|>  two<|sep|><|sep|> \n three<| sep|>\n<|sep|>"
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    parts = list(split_documents(blocks, "<|sep|>"))
    assert [part.text for part in parts] == ["one", "two", "three<| sep|>"]
    assert all(part.ends for part in parts)


def test_document_longer_than_a_block_comes_in_parts(tmp_path: Path) -> None:
    long = ENGLISH * 40_000
    path = write_bytes(tmp_path / "t.txt", f"{long}|{'.' * 3_000_000}|{long}|".encode())
    found = documents(path, "|", piece_bytes=1 << 18)
    assert found == [long.strip(), "." * 3_000_000, long.strip()]
    parts = list(split_documents(iter([long, long]), "|"))
    assert len(parts) == 3 and [part.ends for part in parts] == [False, False, True]


@pytest.mark.parametrize("name", ["t.txt.gz", "t.md.zst"])
def test_separator_splits_compressed_text(tmp_path: Path, name: str) -> None:
    text = "<|endoftext|>\n".join(TEXTS)
    path = write_bytes(tmp_path / name, text.encode())
    assert documents(path, "<|endoftext|>") == expected(text, "<|endoftext|>")


def test_piece_between_two_separators_is_empty(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", b"a" * 50 + b"|" + b"b" * 50)
    units = plan_pieces(
        find_files(str(path)), Reading(separator="|"), piece_bytes=10, cut_text=False
    )
    found = [[part.text for piece in unit for part in read_parts(piece)] for unit in units]
    assert [texts for texts in found if texts] == [["a" * 50], ["b" * 50]]
    assert all(one == [] or other == [] for one, other in pairwise(found[1:5]))
