"""Every family in the engine: cached logits are the whole network's, greedy is transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from gptray.config import UserError, load_config
from gptray.data.tokenizer import Tokenizer
from gptray.generation.cache import FIRST_TOKENS
from gptray.generation.decoder import Piece, StepRows
from gptray.generation.engine import Engine
from gptray.generation.loading import open_engine
from gptray.generation.native_decoder import NativeDecoder
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.hf import load_pretrained
from tests.generation.models import (
    BACKENDS,
    needs_native,
    network,
    prompt_of,
    random_gpt,
    small_tokenizer,
)
from tests.model.foreign_models import FAMILIES, MIXES, SHAPES, make_hf

POSITIONS = 96


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_in_pieces_and_steps_are_the_whole_networks(
    name: str, backend: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    V = tokenizer.vocab_size
    make_hf(name, V).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path).eval()
    ids = prompt_of(tokenizer, POSITIONS, seed=1)
    expected = model(torch.tensor([ids]))[0]
    decoder = network(backend, model, 2, torch.float32)
    first = decoder.step(StepRows([], [Piece(0, 0, ids[:30])])).clone()
    second = decoder.step(StepRows([], [Piece(0, 30, ids[30:45], scored=True)]))
    torch.testing.assert_close(first[:, :V], expected[29:30], atol=1e-4, rtol=0)
    torch.testing.assert_close(second[:, :V], expected[30:45], atol=1e-4, rtol=0)
    for position in range(45, POSITIONS):
        pieces = [Piece(1, 0, ids[:7])] if position == 50 else []
        logits = decoder.step(StepRows([(ids[position], position)], pieces))
        torch.testing.assert_close(logits[0, :V], expected[position], atol=1e-4, rtol=0)
        if pieces:
            torch.testing.assert_close(logits[1, :V], expected[6], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", MIXES, ids=str)
@torch.no_grad()
def test_any_mix_of_choices_is_decoded(
    fields: dict[str, Any], backend: str, tokenizer: Tokenizer
) -> None:
    model = random_gpt(tokenizer, n_head=4, n_positions=40, initializer_range=0.2, **fields)
    ids = prompt_of(tokenizer, 40, seed=3)
    expected = model(torch.tensor([ids]))[0]
    decoder = network(backend, model, 1, torch.float32)
    scored = decoder.step(StepRows([], [Piece(0, 0, ids[:30], scored=True)]))[
        :, : tokenizer.vocab_size
    ]
    torch.testing.assert_close(scored, expected[:30], atol=1e-4, rtol=1e-5)
    for position in range(30, 40):
        logits = decoder.step(StepRows([(ids[position], position)], []))[0, : tokenizer.vocab_size]
        torch.testing.assert_close(logits, expected[position], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_greedy_is_transformers_for_a_hundred_prompts(
    name: str, backend: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    theirs = make_hf(name, tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path).eval()
    engine = Engine(model, tokenizer, max_batch_size=50, backend=backend)
    sampling = Sampling(temperature=0, max_new_tokens=12, utf8=False, ignore_eos=True)
    for length in (1, 6, 20, 40):
        prompts = [prompt_of(tokenizer, length, seed=length + seed) for seed in range(0, 1000, 40)]
        ours = engine.run([Sequence(prompt, sampling) for prompt in prompts])
        expected = theirs.generate(  # type: ignore[operator]
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), length, dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.eos_id,
        )
        assert [one.tokens for one in ours] == expected[:, length:].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_grows_with_what_it_holds(backend: str, tokenizer: Tokenizer) -> None:
    positions = 3 * FIRST_TOKENS
    model = random_gpt(tokenizer, n_layer=1, n_positions=positions, positions="rotary", n_kv_head=1)
    ids = prompt_of(tokenizer, FIRST_TOKENS + 70, seed=2)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    decoder = network(backend, model, 1, torch.float32)
    for start in range(0, len(ids), 90):
        logits = decoder.step(StepRows([], [Piece(0, start, ids[start : start + 90])]))
        last = min(start + 90, len(ids)) - 1
        torch.testing.assert_close(
            logits[0, : tokenizer.vocab_size], expected[last], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_may_be_longer_than_memory_holds(backend: str, tokenizer: Tokenizer) -> None:
    # Whole, the cache of so many sequences would take 275 GB.
    model = random_gpt(tokenizer, n_layer=1, n_embd=4, n_positions=2**20, positions="rotary")
    ids = prompt_of(tokenizer, 5, seed=2)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, -1:]
    logits = network(backend, model, 2**13, torch.float32).step(StepRows([], [Piece(0, 0, ids)]))
    torch.testing.assert_close(logits[:, : tokenizer.vocab_size], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_that_pad_an_embedding_are_never_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = make_hf("qwen3", tokenizer.vocab_size + 50, eos_id=tokenizer.eos_id)
    theirs.get_parameter("model.embed_tokens.weight")[tokenizer.vocab_size :] *= 100
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    config = load_config(None, ["generate.precision=fp32"])
    engine, _ = open_engine(tmp_path, config, max_batch_size=4)
    sampling = Sampling(max_new_tokens=20, utf8=False, ignore_eos=True)
    rows = engine.run([Sequence(prompt_of(tokenizer, 3, seed), sampling) for seed in range(4)])
    assert all(token < tokenizer.vocab_size for row in rows for token in row.tokens)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_hf("llama", tokenizer.vocab_size - 1).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, .* only \d+ rows"):
        open_engine(tmp_path, load_config(None, []))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_special_token_that_was_added_needs_no_row(
    tokenizer: Tokenizer, tmp_path: Path, backend: str
) -> None:
    rows = tokenizer.vocab_size
    make_hf("llama", rows, eos_id=tokenizer.eos_id).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    padded = tokenizers.Tokenizer.from_file(file)
    padded.add_special_tokens(["<pad>"])
    padded.save(file)
    engine, opened = open_engine(tmp_path, load_config(None, [f"generate.backend={backend}"]))
    assert opened.vocab_size == rows + 1
    prompt = opened.prompt_ids("a<pad>b")  # in a text its name is plain text
    (row,) = engine.run([Sequence(prompt, Sampling(max_new_tokens=5, ignore_eos=True))])
    assert row.error is None and len(row.tokens) == 5 and max(row.tokens) < rows
    with pytest.raises(ValueError, match="a token outside 0"):
        engine.check(Sequence(opened.prompt_ids("a<pad>b", parse_special=True)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_tied_embedding_is_that_of_an_own_head_of_the_same_numbers(
    tokenizer: Tokenizer, dtype: torch.dtype, positions: str
) -> None:
    shape: dict[str, Any] = {"n_embd": 36, "n_head": 2, "positions": positions}
    tied = random_gpt(tokenizer, **shape).bfloat16().float()  # bf16 holds its weights exactly
    own = random_gpt(tokenizer, **shape, tie_word_embeddings=False)
    own.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.head})
    prompt = Piece(0, 0, range(0, tokenizer.vocab_size, 9), scored=True)
    logits = [
        NativeDecoder(model, 1, dtype=dtype).step(StepRows([], [prompt])) for model in (tied, own)
    ]
    assert torch.equal(*logits)
