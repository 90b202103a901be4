"""Prompts that come from the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.data.openings import first_words
from gptray.data.tokenizer import char_tokenizer
from tests.data import foreign
from tests.data.prepared import prepared_here


@pytest.mark.parametrize(
    ("val", "prompt"),
    [
        ("cut off\n| --- |\n* x\nThe tree stands here.\n", "The tree stands"),
        ("잘린 줄\n- 첫째\n나무가 저기 서 있다\n", "나무가 저기 서"),
        ("| a |\n| b |\n", "| b"),
        ("only one line", "only one"),
        ("cut off\r\n\r\nYes\r\nNo maybe so\r\n", "Yes"),
        ("cut off\nOne line of words\nNo", "One line of words"),
    ],
)
def test_prompt_of_a_single_document_begins_with_a_word(
    tmp_path: Path, val: str, prompt: str
) -> None:
    data = prepared_here(tmp_path, char_tokenizer(val), train=val, val=val)
    (found,) = first_words(data)
    assert found == prompt


def test_white_space_is_no_prompt(tmp_path: Path) -> None:
    data = prepared_here(tmp_path, char_tokenizer("a \n"), train="a", val=" \n  ")
    assert first_words(data) == []


def test_a_prompt_is_text_alone(tmp_path: Path) -> None:
    backend = foreign.beginning(foreign.byte_level(), "<|begin|> $A")
    data = prepared_here(tmp_path, foreign.as_tokenizer(backend), train="the cat", val="the cat")
    assert data.val.slice(0, 1).tolist() == data.tokenizer.prefix
    assert first_words(data) == ["the"]
