"""BLEU's tokenizer: chosen by the text's script, refused where it cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.evaluation.bleu import check_bleu, compares, pick_bleu
from gptray.evaluation.texts import bleu

KOREAN = "\uc548\ub155 \ud558\uc138\uc694"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KOREAN, "char"),
        (f"{KOREAN} {KOREAN} GPT-2 ok", "char"),
        ("\u4eca\u65e5\u306f\u3002", "char"),
        ("the cat sees a dog", "13a"),
        (f"a long English sentence with one word of {KOREAN[:2]}", "13a"),
        ("\u0434\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c", "13a"),
        ("", "13a"),
    ],
)
def test_auto_counts_characters_where_the_script_is_dense(text: str, expected: str) -> None:
    assert pick_bleu("auto", [text]) == expected
    assert pick_bleu("intl", [text]) == "intl"


@pytest.mark.parametrize("tokenize", ["13a", "char", "intl"])
def test_the_signature_says_which_tokenizer_counted(tokenize: str) -> None:
    score = bleu([KOREAN], [KOREAN], tokenize=tokenize)
    assert f"tok:{tokenize}|" in score["signature"]
    assert "signature" in compares(tokenize)
    # A short Korean text has too few words for BLEU, and enough characters.
    assert (score["score"] > 99) is (tokenize == "char")


@pytest.mark.skipif(find_spec("mecab_ko") is not None, reason="mecab-ko is installed")
def test_a_tokenizer_without_its_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"bleu_tokenize=ko-mecab .*pip install 'sacrebleu\[ko\]'"):
        check_bleu("ko-mecab")


def test_a_tokenizer_without_its_model_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACREBLEU", str(tmp_path))
    with pytest.raises(UserError, match="bleu_tokenize=flores200 needs"):
        check_bleu("flores200")
    for tokenize in ("auto", "13a", "char", "intl"):
        check_bleu(tokenize)


def test_other_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"evaluate\.bleu_tokenize"):
        load_config(None, ["evaluate.bleu_tokenize=mecab"])
