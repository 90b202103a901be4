"""Scores of texts: what sacrebleu's own command says, and counts that can be done by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.evaluation.texts import bleu, chrf, cut_passages, distinct, repetition
from tests.evaluation.splits import split_of
from tests.tiny import tiny_text

KOREAN = "\uc61b\ub0a0 \uc61b\uc801\uc5d0 \ud638\ub791\uc774\uac00 \uc0b4\uc558\ub2e4. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # So few merges that most syllables are three tokens.
    return train_bpe(["the cat sees a dog. " * 5], 270)


def test_a_text_against_itself_has_bleu_100() -> None:
    lines = tiny_text(40).splitlines()
    for score in (bleu(lines, lines), chrf(lines, lines)):
        assert score["score"] == pytest.approx(100)
        assert score["passages"] == 40
    assert "tok:13a" in bleu(lines, lines)["signature"]


def test_a_shuffled_text_has_the_score_of_sacrebleus_command(tmp_path: Path) -> None:
    lines = [line.replace(" ", "\n", 1) for line in tiny_text(60).splitlines()]
    shuffled = []
    for number, line in enumerate(lines):
        words = line.split()
        random.Random(number).shuffle(words)
        shuffled.append(" ".join(words))
    (tmp_path / "real").write_text("".join(" ".join(line.split()) + "\n" for line in lines))
    (tmp_path / "shuffled").write_text("\n".join(shuffled) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "real", "-i", "shuffled", "-m", "bleu", "chrf"]
    done = subprocess.run(
        [*command, "-b", "-w", "6"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout)
    ours = [bleu(shuffled, lines)["score"], chrf(shuffled, lines)["score"]]
    assert 1 < ours[0] < 90
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_distinct_counts_ngrams_of_words() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct(["a", ""], 2) is None


def test_repetition_counts_what_was_said_before() -> None:
    assert repetition([[1, 2, 3, 4, 5, 6]]) == 0
    assert repetition([[1] * 13]) == 0.9
    assert repetition([[1] * 13, [1, 2, 3, 4], [1, 2]]) == pytest.approx(0.45)
    assert repetition([[1, 2, 3]]) is None


def test_passages_are_halves_of_one_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [tokenizer.encode(line) for line in tiny_text(80).splitlines()]
    tokens = [token for document in documents for token in [*document, tokenizer.eos_id]]
    split = split_of(tmp_path, tokens)
    passages = cut_passages(split, tokenizer.decode, eos_id=tokenizer.eos_id, count=20, length=24)
    assert len(passages) > 15
    text = " ".join(map(str, tokens))
    for passage in passages:
        whole = passage.prompt + passage.reference
        assert tokenizer.eos_id not in whole and " ".join(map(str, whole)) in text
        assert abs(len(passage.prompt) - len(passage.reference)) <= 1
    assert passages[0].prompt[0] == tokens[0] or len(documents[0]) < 12


def test_a_passage_is_text_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines, bos = tiny_text(40).splitlines(), tokenizer.vocab_size
    ids = [i for line in lines for i in [bos, *tokenizer.encode(line), tokenizer.eos_id]]
    split = split_of(tmp_path, ids, document_prefix=[bos])
    passages = cut_passages(split, tokenizer.decode, eos_id=tokenizer.eos_id, count=20, length=24)
    assert len(passages) > 15
    for passage in passages:
        assert not {bos, tokenizer.eos_id} & {*passage.prompt, *passage.reference}


def test_no_passage_tears_a_character(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = split_of(tmp_path, tokenizer.encode(KOREAN * 30))
    passages = cut_passages(split, tokenizer.decode, eos_id=tokenizer.eos_id, count=31, length=22)
    assert len(passages) == 31
    for passage in passages:
        text = tokenizer.decode(passage.prompt)
        assert "\ufffd" not in text
        assert text + tokenizer.decode(passage.reference).rstrip("\ufffd") in KOREAN * 30


def test_a_split_shorter_than_a_passage_has_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = split_of(tmp_path, [1, 2, 3])
    assert cut_passages(split, tokenizer.decode, eos_id=0, count=5, length=4) == []
