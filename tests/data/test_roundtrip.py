"""What a tokenizer loses, against its own decoder."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from gptray.data.roundtrip import RoundTrip
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from tests.data import foreign
from tests.data.texts import DOCUMENTS, many_documents

ODD = "a bX \n\t.Ġ▁é\u0301é[UNK]<unk></s><0x41>\ud55c\uad6d\U0001f468\u200d\U0001f469\x00"


def samples(count: int = 300) -> list[str]:
    """Texts of odd characters in any order, some empty or of spaces."""
    rng = random.Random(5)
    drawn = ["".join(rng.choices(ODD, k=rng.randint(0, 40))) for _ in range(count)]
    return [*drawn, *DOCUMENTS, "", " ", "  two", " one", "\n"]


def llama3_like() -> tokenizers.Tokenizer:
    backend = foreign.byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"\s?\w+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return backend


def with_added(*added: AddedToken) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        backend = foreign.byte_level()
        backend.add_tokens(list(added))
        return backend

    return make


def removing() -> tokenizers.Tokenizer:
    backend = foreign.byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


@pytest.mark.parametrize(
    "make", [foreign.byte_level, llama3_like, with_added(AddedToken("<|user|>", special=False))]
)
def test_byte_level_tokenizers_are_known_to_lose_nothing_and_do(
    make: Callable[[], tokenizers.Tokenizer],
) -> None:
    tokenizer = foreign.as_tokenizer(make())
    assert RoundTrip(tokenizer).is_lossless
    for text in samples():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("made", ["bpe", "char"])
def test_tokenizers_made_here_are_known_to_lose_nothing(made: str) -> None:
    text = "".join(many_documents(30))
    tokenizer = train_bpe([text], 300) if made == "bpe" else char_tokenizer(text)
    assert RoundTrip(tokenizer).is_lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "make",
    [
        removing,
        foreign.llama,
        lambda: foreign.byte_level(prefix=True),
        lambda: foreign.byte_level(composed=True),
        with_added(AddedToken("<tool>", rstrip=True)),
        with_added(AddedToken("é")),
    ],
)
def test_whatever_could_change_a_text_is_checked(
    make: Callable[[], tokenizers.Tokenizer],
) -> None:
    assert not RoundTrip(foreign.as_tokenizer(make())).is_lossless


@pytest.mark.parametrize(
    "make",
    [
        removing,
        foreign.llama,
        foreign.wordpiece,
        foreign.dropping_bpe,
        lambda: foreign.unigram("<unk>"),
        lambda: foreign.byte_level(prefix=True),
        lambda: foreign.byte_level(composed=True),
        with_added(AddedToken("<tool>", rstrip=True), AddedToken("é", single_word=True)),
    ],
)
def test_a_text_is_lost_exactly_where_decoding_gives_another(
    make: Callable[[], tokenizers.Tokenizer],
) -> None:
    tokenizer = foreign.as_tokenizer(make())
    trip = RoundTrip(tokenizer)
    for text in samples():
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        same = back == text or (back == f" {text}" and text[:1] != " ")
        assert (trip.lost(text, ids) is None) is same, (text, back)


def lost(backend: tokenizers.Tokenizer, text: str) -> dict[str, int]:
    tokenizer = foreign.as_tokenizer(backend)
    found = RoundTrip(tokenizer).lost(text, tokenizer.encode(text))
    return dict(found.kinds) if found else {}


def test_spaces_that_come_and_go_before_a_text_are_no_loss() -> None:
    text = "the cat sees a dog.\n  Two spaces, 한국어"
    assert lost(foreign.llama(), text) == {}
    assert lost(foreign.byte_level(prefix=True), text) == {}
    assert lost(foreign.byte_level(prefix=True), f" {text}") == {}


def test_lossy_tokenizers_lose_what_they_drop_or_change() -> None:
    assert lost(foreign.wordpiece(), "the cat sees a dog") == {}
    assert lost(foreign.wordpiece(), "The cat\nsees 한국어") == {
        "case": 1,
        "white_space": 1,
        "unknown": 9,
    }
    assert lost(foreign.unigram("<unk>"), "the 한국어 dog") == {"unknown": 9}
    assert lost(foreign.dropping_bpe(), "한국어 한국어") == {"unknown": 19}
    assert lost(foreign.byte_level(composed=True), "the e\u0301 dog") == {"other": 3}


def test_parts_of_a_text_lose_what_the_whole_loses() -> None:
    tokenizer = foreign.as_tokenizer(foreign.byte_level(composed=True))
    trip = RoundTrip(tokenizer)
    assert trip.adds_up
    parts = ["the", " e\u0301", " dog e\u0301"]
    found = [trip.lost(part, tokenizer.encode(part), begins=False) for part in parts]
    whole = trip.lost("".join(parts), tokenizer.encode("".join(parts)))
    assert whole and sum(one.bytes for one in found if one) == whole.bytes == 6


def test_a_part_that_gains_a_space_is_told() -> None:
    tokenizer = Tokenizer(foreign.byte_level(prefix=True), {"eos_token": "<|endoftext|>"})
    found = RoundTrip(tokenizer).lost("dog", tokenizer.encode("dog"), begins=False)
    assert found and found.kinds == {"white_space": 1}
