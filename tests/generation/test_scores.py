"""What an engine tells of a prompt's own tokens, and of the token that ends a text."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.generation.sampling import Drawn
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from tests.generation.models import BACKENDS, needs_native, random_gpt, run, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def prompts(tokenizer: Tokenizer, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(1, tokenizer.vocab_size) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_are_scored_as_the_model_scores_them(tokenizer: Tokenizer, backend: str) -> None:
    model = random_gpt(tokenizer, n_head=4, n_embd=44, n_positions=300, vocab_size=512)
    sampling = Sampling(max_new_tokens=3, min_new_tokens=3, seed=1, logprobs=1)
    requests = [
        Sequence(prompt, sampling, prompt_logprobs=i % 4)
        for i, prompt in enumerate(prompts(tokenizer, (1, 2, 127, 128, 129, 297, 5)))
    ]
    engine = Engine(model, tokenizer, max_batch_size=3, backend=backend)
    for generation in run(engine, requests):
        ids, count = list(generation.prompt), generation.prompt_logprobs
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size]
        expected = torch.log_softmax(logits, -1)
        assert [drawn.token for drawn in generation.scored] == ids
        assert generation.scored[0] == Drawn(ids[0])
        for drawn, row in zip(generation.scored[1:], expected, strict=False):
            assert drawn.logprob == pytest.approx(row[drawn.token].item(), abs=1e-4)
            assert [token for token, _ in drawn.top] == row.topk(count or 0).indices.tolist()
            for token, logprob in drawn.top:
                assert logprob == pytest.approx(row[token].item(), abs=1e-4)
                # Clients find greedy tokens by comparing the two.
                assert (token == drawn.token) == (logprob == drawn.logprob)


@pytest.mark.parametrize(
    ("backend", "dtype", "quantize"),
    [
        ("torch", torch.float32, "none"),
        ("torch", torch.float32, "int8"),
        pytest.param("native", torch.float32, "none", marks=needs_native),
        pytest.param("native", torch.bfloat16, "int8", marks=needs_native),
        pytest.param("native", torch.bfloat16, "int4", marks=needs_native),
    ],
)
def test_scores_have_the_same_bits_in_any_batch_and_change_no_neighbour(
    tokenizer: Tokenizer, backend: str, dtype: torch.dtype, quantize: str
) -> None:
    model = random_gpt(tokenizer, n_embd=60, n_head=4, n_positions=300)
    requests = [
        Sequence(
            prompt,
            Sampling(max_new_tokens=9, seed=i, temperature=1.5, logprobs=2),
            prompt_logprobs=2 if i % 2 else None,
        )
        for i, prompt in enumerate(prompts(tokenizer, (3, 130, 260, 17, 200, 1, 64, 65, 129, 40)))
    ]

    def engine(slots: int) -> Engine:
        return Engine(
            model, tokenizer, max_batch_size=slots, dtype=dtype, quantize=quantize, backend=backend
        )

    together = run(engine(10), requests)
    few = run(engine(3), requests[::-1])[::-1]
    without = engine(10).run([replace(request, prompt_logprobs=None) for request in requests])
    for request, one, other, plain in zip(requests, together, few, without, strict=True):
        (alone,) = run(engine(1), [request])
        assert alone.scored == one.scored == other.scored
        assert len(alone.scored) == (len(request.prompt) if request.prompt_logprobs else 0)
        assert alone.drawn == one.drawn == other.drawn == plain.drawn


def test_logits_of_scored_prompts_are_bounded_in_bytes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = random_gpt(tokenizer, n_positions=300), Sampling(max_new_tokens=0)
    asked = [Sequence(prompt, read, prompt_logprobs=1) for prompt in prompts(tokenizer, (70, 9, 4))]
    expected = run(Engine(model, tokenizer, backend="graph", max_batch_size=4), asked)
    monkeypatch.setattr("gptray.generation.engine.SCORED_BYTES", 32 * 4 * tokenizer.vocab_size)
    engine = Engine(model, tokenizer, backend="graph", max_batch_size=4)
    given = [engine.submit(replace(sequence)) for sequence in asked]
    # The first token has no score, but logits follow the last.
    for scored in ([33, 1, 1], [65, 1, 1], [70, 9, 4]):
        engine.step()
        assert [len(sequence.scored) for sequence in given] == scored
    for one, other in zip(given, expected, strict=True):
        assert [drawn.token for drawn in one.scored] == [drawn.token for drawn in other.scored]
        for found, score in zip(one.scored[1:], other.scored[1:], strict=True):
            assert found.logprob == pytest.approx(score.logprob, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_may_be_scored_without_going_on_from_it(
    tokenizer: Tokenizer, backend: str
) -> None:
    model = random_gpt(tokenizer, n_positions=300)
    full, short, other = prompts(tokenizer, (300, 40, 30))
    go_on, read = Sampling(max_new_tokens=20, min_new_tokens=20), Sampling(max_new_tokens=0)
    requests = [
        Sequence(other, go_on),
        Sequence(full, read, prompt_logprobs=0),
        Sequence(short, read, prompt_logprobs=0),
        Sequence(other, replace(go_on, seed=1)),
    ]
    (going, *scored, more) = run(
        Engine(model, tokenizer, max_batch_size=3, backend=backend), requests
    )
    for generation, prompt in zip(scored, (full, short), strict=True):
        assert [drawn.token for drawn in generation.scored] == prompt
        assert all(drawn.logprob is not None for drawn in generation.scored[1:])
        assert (generation.tokens, generation.text, generation.end) == ([], "", None)
        assert generation.finish_reason == "length"
    for generation, request in ((going, requests[0]), (more, requests[3])):
        engine = Engine(model, tokenizer, backend=backend)
        assert generation.drawn == run(engine, [request])[0].drawn


def test_the_token_that_ends_a_text_is_told_apart(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    sampling = Sampling(
        max_new_tokens=5, min_new_tokens=2, temperature=0, logit_bias=((eos, 100.0),), logprobs=1
    )
    ends, goes_on, cut = Engine(random_gpt(tokenizer), tokenizer).run(
        [
            Sequence([1, 2], sampling),
            Sequence([1, 2], replace(sampling, ignore_eos=True)),
            Sequence([1, 2], replace(sampling, max_new_tokens=2)),
        ]
    )
    assert ends.end is not None and ends.end.token == eos and ends.end.logprob is not None
    assert ends.finish_reason == "stop" and len(ends.tokens) == 2 and eos not in ends.tokens
    assert goes_on.tokens == [*ends.tokens, eos, eos, eos]
    assert goes_on.end is None and goes_on.finish_reason == "length"
    assert cut.end is None and cut.finish_reason == "length"
    # OpenAI's clients count on one token, be it the end.
    (only,) = Engine(random_gpt(tokenizer), tokenizer).run(
        [Sequence([1, 2], replace(sampling, max_new_tokens=1, min_new_tokens=0))]
    )
    assert only.tokens == [] and only.end is not None and only.finish_reason == "stop"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Sequence([1], Sampling(max_new_tokens=0)), "max_new_tokens=0"),
        (Sequence([1] * 65, Sampling(max_new_tokens=0), prompt_logprobs=0), "too long"),
        (Sequence([1], Sampling(logit_bias=((10**6, 1.0),))), "logit_bias"),
    ],
    ids=["nothing to do", "too long", "bias"],
)
def test_what_cannot_be_scored_or_biased_is_refused(
    tokenizer: Tokenizer, request_: Sequence, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(random_gpt(tokenizer), tokenizer).submit(request_)
