from __future__ import annotations

import io

import pytest

from gptray.data.boundary import (
    LONGEST_RUN,
    LONGEST_WORD,
    byte_boundary,
    chunks,
    first_boundary,
    last_boundary,
    short_words,
)
from tests.data.texts import CHINESE, DOCUMENTS, ENGLISH, KOREAN


@pytest.mark.parametrize("text", DOCUMENTS)
def test_chunks_join_to_the_text(text: str) -> None:
    parts = chunks(text)
    assert "".join(parts) == text
    assert all(parts)


def test_cuts_stand_behind_letters_and_single_newlines() -> None:
    assert chunks("one two,  3\n\nx.\ny") == ["one", " two,  3", "\n\nx.\n", "y"]
    assert chunks(CHINESE)[0].endswith("\u3002\n")


def test_first_and_last_agree_with_chunks() -> None:
    for text in (ENGLISH, KOREAN, CHINESE):
        parts = chunks(text)
        assert first_boundary(text) == len(parts[0])
        assert last_boundary(text) == len(text) - len(parts[-1])
    assert first_boundary("abc") == last_boundary("abc") == 0


def test_every_byte_offset_leads_to_a_cut_of_the_whole_text() -> None:
    text = KOREAN + " " + ENGLISH + CHINESE
    content = text.encode()
    cuts = {0, len(content)}
    for part in chunks(text):
        cuts.add(max(cuts - {len(content)}) + len(part.encode()))
    found = [byte_boundary(io.BytesIO(content), n, len(content)) for n in range(len(content) + 1)]
    assert set(found) <= cuts
    assert found == sorted(found)
    assert all(cut >= offset for offset, cut in enumerate(found))


@pytest.mark.parametrize("character", ["a", "\u3002", "\uac00"])
def test_text_without_a_boundary_is_cut_at_the_offset(character: str) -> None:
    content = (character * (3 * LONGEST_RUN // len(character.encode()))).encode()
    stream = io.BytesIO(content)
    for offset in (1, 5, 1000, LONGEST_RUN + 1):
        cut = byte_boundary(stream, offset, len(content))
        assert 0 <= cut - offset < 3
        assert content[:cut].decode()
    near_end = len(content) - 10
    assert byte_boundary(stream, near_end, len(content)) == len(content)


def test_boundary_is_found_across_windows() -> None:
    for length in range(65_530, 65_542):
        content = b"." * length + "\uac00\uac00 b".encode()
        found = byte_boundary(io.BytesIO(content), 1, len(content))
        assert content[found:] == b" b"


def test_words_that_a_trainer_sees_are_short() -> None:
    texts = [ENGLISH, KOREAN, "word " * 900, CHINESE * 50]
    for text in texts:
        assert list(short_words(text)) == [text]
    for text in ("ACGT" * 1000, "7" * 999, " " * 1000, "." * 600 + "end", "\u4e00" * 700):
        parts = list(short_words(f"before {text} after"))
        assert "".join(parts) == f"before {text} after"
        assert len(parts) > 2
        assert max(len(run) for part in parts for run in part.split()) <= LONGEST_WORD
