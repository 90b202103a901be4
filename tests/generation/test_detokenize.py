"""Streamed text: whole characters, equal to all at once, cut exactly at stop strings."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.generation.detokenize import TextStream, decode_after, left_context
from tests.data import foreign

TEXT = (
    "Once upon a time, \uc61b\ub0a0 \uc61b\uc801\uc5d0 \ud638\ub791\uc774\uac00 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f984! caf\u00e9\n\n\tx  y\ufffd z"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte: every Korean syllable is three tokens, every emoji four or more."""
    return train_bpe(["a"], 257)


def metaspace_tokenizer() -> Tokenizer:
    """Words with a leading-space mark, which decoding drops at the beginning; bytes for others."""
    words = ["\u2581once", "\u2581upon", "\u2581a", "\u2581time", "on", "ce"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)} | {"<unk>": 300, "</s>": 301}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def streamed(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    stop: Sequence[str] = (),
    unstopped: int = 0,
    *,
    keeps_stop: bool = False,
) -> list[str]:
    stream = TextStream(tokenizer.decode, stop, unstopped=unstopped, keeps_stop=keeps_stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), train_bpe([TEXT] * 3, 300), char_tokenizer(TEXT)]
)
def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT.replace("\ufffd", ""))
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT.replace("\ufffd", "")
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_real_replacement_character_comes_through() -> None:
    tokenizer = byte_tokenizer()
    assert "".join(streamed(tokenizer, tokenizer.encode(TEXT))) == TEXT
    assert "".join(streamed(tokenizer, tokenizer.encode("\ufffd"))) == "\ufffd"


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_stream_to_what_they_decode_to(seed: int) -> None:
    # Models draw bytes that are no UTF-8 at all.
    rng, tokenizer = random.Random(seed), byte_tokenizer()
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 60))]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_words_that_carry_their_space_stream_to_what_they_decode_to() -> None:
    tokenizer = metaspace_tokenizer()
    words = [256, 257, 258, 259, *"\uc61b\ub0a0".encode(), 258, 258, 0xF0, 0x9F, 0xA6, 0x84, 257]
    pieces = streamed(tokenizer, words)
    assert "".join(pieces) == "once upon a time\uc61b\ub0a0 a a\U0001f984 upon"
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_flows_without_delay() -> None:
    tokenizer = byte_tokenizer()
    assert streamed(tokenizer, tokenizer.encode("abc"))[:3] == ["a", "b", "c"]
    # Nothing held for a stop string that cannot come any more.
    pieces = streamed(tokenizer, tokenizer.encode("axbxy!"), stop=["xyz"])
    assert pieces == ["a", "", "xb", "", "", "xy!", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("\uc61b\ub0a0 \uc61b\uc801\uc5d0", ["\uc801"], "\uc61b\ub0a0 \uc61b"),
        ("aaab", ["aab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("stop first", ["first", "stop"], ""),
        ("no such", ["END"], "no such"),
        ("ends with EN", ["END"], "ends with EN"),
        ("x\U0001f984y", ["\U0001f984"], "x"),
    ],
)
def test_stop_strings_cut_exactly(text: str, stop: list[str], expected: str) -> None:
    for tokenizer in (byte_tokenizer(), train_bpe([text] * 5, 280)):
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids, stop)) == expected
        kept = "".join(streamed(tokenizer, ids, stop, keeps_stop=True))
        assert kept in {expected + one for one in stop} or kept == expected == text


def test_of_stop_strings_that_begin_together_the_shortest_is_kept() -> None:
    for tokenizer in (byte_tokenizer(), train_bpe(["one END two"] * 5, 280)):
        ids = tokenizer.encode("one END two")
        for stop in (["END", "E"], ["E", "END", "N"]):
            assert "".join(streamed(tokenizer, ids, stop, keeps_stop=True)) == "one E"


@pytest.mark.parametrize(
    ("text", "stop", "unstopped", "expected"),
    [
        ("xx one xx two", ["xx"], 2, "xx one "),
        ("xx one xx two", ["xx"], 1, ""),
        ("xxx", ["xx"], 2, "x"),
        ("xx one", ["xx"], 9, "xx one"),
        ("abcabc", ["ca", "b"], 2, "ab"),
        ("\n\nword\n", ["\n"], 3, "\n\nword"),
    ],
)
def test_stop_strings_count_only_where_they_end_behind_the_least_tokens(
    text: str, stop: list[str], unstopped: int, expected: str
) -> None:
    tokenizer = byte_tokenizer()
    pieces = streamed(tokenizer, tokenizer.encode(text), stop, unstopped)
    assert "".join(pieces) == expected


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a\uc61b")[:-1]
    assert streamed(tokenizer, ids) == ["a", "", "", tokenizer.decode(ids)[1:]]


def test_a_stop_string_holds_though_the_text_is_cut_inside_a_character() -> None:
    # One token of a stop string and the first byte of a syllable.
    joined = tokenizers.Tokenizer(models.BPE({"end\u00ec": 0, "a": 1, "<|endoftext|>": 2}, []))
    joined.decoder = decoders.ByteLevel()
    cut = Tokenizer(joined, {"eos_token": "<|endoftext|>"})
    assert "".join(streamed(cut, [1, 0], ["nd"])) == "ae"
    assert "".join(streamed(cut, [1, 0])) == "aend\ufffd"


@pytest.mark.parametrize("prompt", ["the cat", "the 가", "the 😀"])
def test_a_continuation_keeps_its_space_behind_a_character_of_byte_tokens(prompt: str) -> None:
    tokenizer = foreign.as_tokenizer(foreign.llama_first())
    ids, dog = tokenizer.encode(prompt), tokenizer.encode("dog")
    lead = left_context(tokenizer, ids)
    assert decode_after(tokenizer.decode, lead, dog) == " dog"
    assert left_context(tokenizer, [*ids, tokenizer.eos_id]) == []
