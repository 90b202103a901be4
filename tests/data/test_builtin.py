from __future__ import annotations

import sys
from collections import Counter

import pytest

from gptray.config import UserError
from gptray.data.builtin import builtin_documents, builtin_version


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return builtin_documents()


def test_builtin_is_a_corpus_of_some_megabytes(documents: list[str]) -> None:
    assert 1_000_000 < sum(map(len, documents)) < 4_000_000
    assert len(documents) > 300


def test_builtin_repeats_no_paragraph(documents: list[str]) -> None:
    paragraphs = Counter(" ".join(p.split()) for text in documents for p in text.split("\n\n"))
    assert [text for text, count in paragraphs.items() if count > 1] == []
    assert "" not in paragraphs


def test_builtin_has_topics_and_docstrings(documents: list[str]) -> None:
    text = "\n\n".join(documents)
    assert 'The "assert" statement' in text
    assert "Serialize ``obj`` to a JSON formatted ``str``." in text


@pytest.mark.slow
def test_builtin_is_always_the_same(documents: list[str]) -> None:
    assert builtin_documents() == documents
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in builtin_version()


def test_python_without_documentation_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="comes without its documentation"):
        builtin_documents()
