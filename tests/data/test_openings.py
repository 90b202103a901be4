"""Prompts that come from the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.data.openings import first_words, openings
from gptray.data.tokenizer import char_tokenizer
from gptray.model.example import load_example, save_example
from tests.data import foreign
from tests.data.chatting import CHATS, chat_tokenizer
from tests.data.prepared import chats_here, prepared_here


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


def test_the_opening_of_chats_is_one_that_a_model_folder_can_keep(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    answering = "<|im_start|>assistant\n"
    (short,) = openings(chats_here(tmp_path / "short", tokenizer, CHATS[:1]))
    assert short.parse_special and short.prompt.endswith(f"the old king? \n<|im_end|>\n{answering}")
    asked = {"role": "user", "content": "brother " * 130}
    (long,) = openings(chats_here(tmp_path / "long", tokenizer, [[asked, CHATS[0][2]]]))
    assert long.prompt == f"<|im_start|>user\nHello<|im_end|>\n{answering}"
    save_example(tmp_path, long.prompt, parse_special=True)
    assert load_example(tmp_path) == (long.prompt, True)
