from __future__ import annotations

from tokenizers import AddedToken

from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.data.vocabulary import differing_ids, kept_rows
from tests.data import foreign


def test_added_tokens_are_new_and_the_others_stay() -> None:
    own = foreign.as_tokenizer(foreign.byte_level())
    backend = foreign.byte_level()
    backend.add_tokens([AddedToken("<|user|>"), AddedToken("<|bot|>")])
    more = foreign.as_tokenizer(backend)
    assert differing_ids(own, more) == differing_ids(more, own) == 0
    assert kept_rows(own, more) == [*range(own.vocab_size), -1, -1]
    assert kept_rows(more, own) == list(range(own.vocab_size))


def test_tokens_of_another_tokenizer_are_found_by_the_text_that_they_stand_for() -> None:
    own, other = foreign.as_tokenizer(foreign.byte_level()), foreign.as_tokenizer(foreign.llama())
    rows = kept_rows(own, other)
    assert differing_ids(own, other) > 200
    for name in ("\u2581cat", "\u2581the", "s"):
        assert own.names[rows[other.names.index(name)]] == name.replace("\u2581", "\u0120")
    assert rows[other.names.index("\u2581") :].count(-1) > 10  # words that the other alone has
    byte = other.names.index("<0xE9>")
    assert own.names[rows[byte]] == "\u00e9"  # byte 0xE9 in a byte-level vocabulary
    assert rows[other.eos_id] == own.eos_id


def test_characters_keep_their_rows_in_another_alphabet() -> None:
    own, other = char_tokenizer("bcd"), char_tokenizer("abcde")
    assert kept_rows(own, other) == [-1, 0, 1, 2, -1, 3]
    bpe: Tokenizer = train_bpe(["abc"], 260)
    assert [bpe.names[row] for row in kept_rows(bpe, other)[:3]] == ["a", "b", "c"]
