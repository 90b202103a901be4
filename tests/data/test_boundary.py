from __future__ import annotations

import io

import pytest

from gptray.data.boundary import byte_boundary, chunks, first_boundary, last_boundary
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
