"""Texts by name: what those are called that have none, and names that are none."""

from __future__ import annotations

import pytest

from gptray.config import ConfigError, dump, load_config


def also(*words: str) -> object:
    return load_config(None, list(words)).evaluate.also


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("old.txt", {"old.txt": "old.txt"}),
        ("/x/books/", {"books": "/x/books/"}),
        ("docs/*.md", {"docs-md": "docs/*.md"}),
        ("[a/b.txt, s3://c/d.jsonl]", {"b.txt": "a/b.txt", "d.jsonl": "s3://c/d.jsonl"}),
        ("{docs: 'x/**', 책: b.txt}", {"docs": "x/**", "책": "b.txt"}),
        ("null", None),
    ],
)
def test_each_text_has_a_name(word: str, texts: object) -> None:
    assert also(f"evaluate.also={word}") == texts


def test_a_saved_config_has_the_names() -> None:
    config = load_config(None, ["evaluate.also=[a/b.txt, c.txt]"])
    text = dump(config)
    assert "b.txt: a/b.txt" in text


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("[a/x.txt, b/x.txt]", r"two texts are called x.txt; give them names"),
        ("{a/b: x.txt}", r"the name 'a/b' must consist of letters"),
        ("{a: null}", r"'a' has no value"),
        ("[]", r"evaluate.also"),
    ],
)
def test_names_that_are_none_are_refused(word: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        also(f"evaluate.also={word}")
