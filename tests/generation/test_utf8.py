"""Whole characters: what is masked while decoding, and that no more than that is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch

from gptray.data.roundtrip import pieces
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.generation.engine import Engine
from gptray.generation.sampling import draw
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import INVALID, START, Utf8
from tests.data.foreign import llama, wordpiece
from tests.generation.models import BACKENDS, drawing, random_gpt, run, small_tokenizer

BROKEN = "\ufffd"
CPU = torch.device("cpu")


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and one for end of text."""
    return train_bpe([], 257)


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece's: what it has no token for is spelled in bytes, such as <0xEA>."""
    return Tokenizer(llama(), {"eos_token": "</s>"})


def automaton(tokenizer: Tokenizer) -> Utf8:
    return Utf8(tokenizer, tokenizer.vocab_size, CPU)


def ids_of(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The tokens of single bytes."""
    found = pieces(tokenizer)
    return [found.index(bytes([byte])) for byte in text]


def requests_of_all_kinds(tokenizer: Tokenizer, count: int) -> list[Sequence]:
    rng = random.Random(1)
    return [
        Sequence(
            tokenizer.encode("\uc61b\ub0a0") + [tokenizer.eos_id] * rng.randint(1, 40),
            Sampling(
                max_new_tokens=rng.randint(1, 40),
                min_new_tokens=rng.choice([0, 1]),
                temperature=rng.choice([0, 0.7, 2.0]),
                top_k=rng.choice([None, 1, 40]),
                top_p=rng.choice([None, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                stop=rng.choice([(), ("e", "\uc774")]),
                seed=number,
                ignore_eos=rng.choice([True, False]),
            ),
        )
        for number in range(count)
    ]


def broken(generations: list[Sequence]) -> int:
    assert not any(generation.error for generation in generations)
    return sum(BROKEN in generation.text for generation in generations)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [byte_tokenizer, small_tokenizer, fallback_tokenizer])
def test_no_output_has_a_broken_character_though_the_weights_are_random(
    make: Callable[[], Tokenizer], backend: str
) -> None:
    tokenizer = make()
    engine = Engine(random_gpt(tokenizer), tokenizer, max_batch_size=16, backend=backend)
    requests = requests_of_all_kinds(tokenizer, 32)
    assert broken(run(engine, requests)) == 0
    free = [replace(one, sampling=replace(one.sampling, utf8=False)) for one in requests]
    assert broken(run(engine, free)) > 10


def test_every_text_can_be_written_and_no_other_bytes() -> None:
    tokenizer = byte_tokenizer()
    guard, rng = automaton(tokenizer), random.Random(2)
    token = dict(zip(pieces(tokenizer), range(tokenizer.vocab_size), strict=True))
    for number in [*range(0, 0x11_0000, 397), 0xD7FF, 0xE000, 0xFFFC, 0xFFFE, 0x10_FFFF]:
        if number in range(0xD800, 0xE000) or chr(number) == BROKEN:
            continue
        state = START
        for byte in chr(number).encode():
            state = guard.next(state, token[bytes([byte])])
            assert state != INVALID, hex(number)
        assert state == START
    for _ in range(8000):
        state, written = START, b""
        while state != INVALID and len(written) < 6:
            one = bytes([rng.choice((rng.randrange(256), rng.randrange(0x80, 0x100)))])
            state, written = guard.next(state, token[one]), written + one
        valid = written if state == START else written[:-1]
        assert BROKEN not in valid.decode(errors="ignore")
        if state == START:
            assert written.decode()
    _, state = guard.open_end([token[bytes([byte])] for byte in b"\xef\xbf"])
    assert guard.next(state, token[b"\xbd"]) == INVALID


@pytest.mark.parametrize("begun", [b"", b"\xed", b"\xed\x95"])
def test_exactly_k_of_the_tokens_that_remain_are_eligible(begun: bytes) -> None:
    tokenizer = byte_tokenizer()
    guard = automaton(tokenizer)
    _, state = guard.open_end(ids_of(tokenizer, begun))
    sampling, eos = Sampling(top_k=3, logit_bias=((tokenizer.eos_id, -9.0),)), tokenizer.eos_id
    rows = [
        drawing(replace(sampling, seed=seed), 1, [1], eos, mask=guard.mask(state, 9))
        for seed in range(200)
    ]
    drawn = draw(torch.zeros(200, tokenizer.vocab_size), rows)
    allowed = [i for i in range(257) if i != eos and guard.next(state, i) != INVALID]
    assert {one.token for one in drawn if one} == set(allowed[:3])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_character_is_begun_only_where_there_is_room_to_end_it(length: int) -> None:
    tokenizer = byte_tokenizer()
    model = random_gpt(tokenizer)
    model.transformer.wte.weight.data[ids_of(tokenizer, b"\xed")] = 9.0
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_new_tokens=length, ignore_eos=True)
    rows = [Sequence([tokenizer.eos_id], replace(sampling, seed=seed)) for seed in range(50)]
    full = [replace(row, prompt=[tokenizer.eos_id] * (64 - length)) for row in rows]
    full = [replace(row, sampling=replace(row.sampling, max_new_tokens=9)) for row in full]
    for generation in run(engine, [*rows, *full]):
        assert len(generation.tokens) == length
        assert BROKEN not in generation.text


@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("live", [True, False])
def test_a_prompt_that_stops_inside_a_character_is_continued_from_there(
    make: Callable[[], Tokenizer], begun: int, live: bool
) -> None:
    tokenizer = make()
    engine = Engine(random_gpt(tokenizer), tokenizer)
    beginning = "\ud55c".encode()[:begun]
    prompt = [tokenizer.eos_id, *ids_of(tokenizer, beginning)]
    for seed in range(20):
        request = Sequence(prompt, Sampling(seed=seed, max_new_tokens=8), live_text=live)
        (done,) = run(engine, [request])
        assert BROKEN not in done.text
        assert done.text[0].encode().startswith(beginning)


def test_a_row_inside_a_character_does_not_depend_on_its_neighbours() -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer)
    requests = requests_of_all_kinds(tokenizer, 16)
    together = run(Engine(model, tokenizer, max_batch_size=16), requests)
    alone = [run(Engine(model, tokenizer, max_batch_size=1), [one])[0] for one in requests]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_log_probabilities_are_the_models_own() -> None:
    tokenizer = byte_tokenizer()
    guard = automaton(tokenizer)
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(logits, dim=-1)[0]
    sampling = Sampling(temperature=0, logprobs=tokenizer.vocab_size)
    (drawn,) = draw(logits, [drawing(sampling, 1, [1], tokenizer.eos_id, mask=guard.mask(1, 9))])
    assert drawn and guard.next(1, drawn.token) == START
    assert drawn.logprob == pytest.approx(float(expected[drawn.token]))
    assert len(drawn.top) == tokenizer.vocab_size


def test_tokenizers_without_bytes_have_nothing_to_mask() -> None:
    words = Tokenizer(wordpiece(), {"eos_token": "[SEP]"})
    assert not automaton(char_tokenizer("\ud55c\uad6d\uc5b4")).is_needed
    assert not automaton(words).is_needed
    assert automaton(char_tokenizer(BROKEN)).is_needed


def test_a_vocabulary_that_cannot_end_a_character_never_begins_one() -> None:
    # Byte-level by its decoder, with the lead byte of a character and nothing to follow it.
    odd: dict[str, Any] = {**train_bpe([], 257).parts()}
    vocab = {"a": 0, "\u00ed": 1, "<|endoftext|>": 2}
    odd["model"] |= {"vocab": vocab, "merges": []}
    odd["added_tokens"][0]["id"] = 2
    backend = tokenizers.Tokenizer.from_str(json.dumps(odd))
    tokenizer = Tokenizer(backend, {"eos_token": "<|endoftext|>"})
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    rows = [drawing(Sampling(temperature=0), 1, [0], 2, mask=automaton(tokenizer).mask(START, 9))]
    assert [drawn and drawn.token for drawn in draw(logits, rows)] == [2]


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_text_are_the_same_text_streamed_or_not(seed: int) -> None:
    tokenizer = fallback_tokenizer()
    engine = Engine(random_gpt(tokenizer, seed=seed), tokenizer)
    asked = [
        Sequence(
            [tokenizer.eos_id],
            Sampling(max_new_tokens=30, temperature=9.0, seed=seed, utf8=False),
            live_text=live,
        )
        for live in (True, False)
    ]
    live, whole = run(engine, asked)
    assert "\ufffd" in whole.text and live.tokens == whole.tokens
    assert live.text == whole.text
