"""Names of runs: letters of any script, one folder for each name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.config.names import slug
from gptray.jobs.folders.run_folder import resolve

NAME = "\ud55c\uad6d\uc5b4"  # three syllables, composed


@pytest.mark.parametrize(
    "name", [NAME, f"{NAME}-2", "book.v1_x", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0440\u0443"]
)
def test_names_may_have_letters_of_any_script(name: str) -> None:
    assert load_config(None, [f"name={name}"]).name == name


def test_a_decomposed_name_is_the_same_run() -> None:
    decomposed = unicodedata.normalize("NFD", NAME)
    assert decomposed != NAME
    assert load_config(None, [f"name={decomposed}"]).name == NAME


@pytest.mark.parametrize(
    "name", ["a/b", ".a", "-a", "_a", "a b", "a\u200bb", "\u2603", "..", "\ud55c:1"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="name: must consist of letters and digits of any script"):
        load_config(None, [f"name='{name}'"])


def test_no_run_is_named_as_the_folder_of_prepared_text() -> None:
    with pytest.raises(UserError, match="name: must not be data, the folder of prepared text"):
        load_config(None, ["name=data"])


def test_a_name_is_measured_in_bytes() -> None:
    assert load_config(None, [f"name={NAME * 22}"]).name
    with pytest.raises(UserError, match="name: has 201 bytes, more than 200"):
        load_config(None, [f"name={NAME * 22}abc"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (unicodedata.normalize("NFD", f"{NAME} \ub300\ud654(1)"), f"{NAME}-\ub300\ud654-1"),
        ("My book_v2!", "my-book-v2"),
        ("...", ""),
        ("\ud55c" * 50, "\ud55c" * 24),
    ],
)
def test_a_slug_keeps_letters_and_digits(text: str, expected: str) -> None:
    assert slug(text, 24) == expected


def test_a_run_is_named_by_its_text(tmp_path: Path) -> None:
    text = tmp_path / f"{NAME}.txt"
    text.write_text("x")
    config = load_config(None, [f"data.source={text}", f"storage_path={tmp_path}"])
    name = resolve(config).name
    assert name and name.startswith(f"{NAME}-")
