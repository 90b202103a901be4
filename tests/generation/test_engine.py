"""The engine against its oracles: no cache at all, and Hugging Face."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptray.data.tokenizer import Tokenizer
from gptray.generation.decoder import Piece, StepRows
from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.model.importance import input_importance
from gptray.model.precision import enable_fast_fp32
from gptray.model.quantized import quantize as quantize_weight
from tests.generation.models import (
    BACKENDS,
    needs_native,
    network,
    prompt_of,
    random_gpt,
    reference,
    run,
    small_tokenizer,
)

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_layer": 3, "n_head": 5, "n_embd": 35, "n_positions": 300},
    {"n_head": 1, "n_embd": 24, "n_inner": 40},
    {"n_layer": 1, "n_head": 8, "n_embd": 64, "n_positions": 130},
]


# With all that GPT-2 lacks: a network whose rows must keep their bits too.
MODERN: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 2, "head_dim": 18,
    "qk_norm": True, "sliding_window": 23, "mlp_bias": False, "tie_word_embeddings": False,
    "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def uncached() -> dict[str, list[list[int]]]:
    """What models give without a cache, for all backends, since it takes longer than they do."""
    return {}


def mixed_requests(
    tokenizer: Tokenizer, count: int, n_positions: int, *, most: int = 40, utf8: bool = True
) -> list[Sequence]:
    """Prompts of all lengths, each with settings of its own and at most so many new tokens."""
    rng = random.Random(5)
    most = min(most, n_positions // 2)
    return [
        Sequence(
            prompt_of(tokenizer, rng.randint(1, n_positions - 1), seed=i),
            Sampling(
                max_new_tokens=rng.randint(1, most),
                temperature=rng.choice([0, 0.7, 1.3]),
                top_k=rng.choice([None, 5, 40]),
                top_p=rng.choice([None, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                seed=i,
                utf8=utf8,
            ),
        )
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "ablation", [{}, {"norm": "none", "residual": False}], ids=["gpt2", "bare"]
)
def test_every_request_gets_what_the_uncached_model_gives(
    tokenizer: Tokenizer,
    uncached: dict[str, list[list[int]]],
    backend: str,
    shape: dict[str, Any],
    ablation: dict[str, Any],
) -> None:
    if ablation:
        shape = {**shape, "initializer_range": 0.6}
    model = random_gpt(tokenizer, **shape, **ablation)
    requests = mixed_requests(tokenizer, 12, model.config.n_positions, utf8=False)
    engine = Engine(model, tokenizer, max_batch_size=5, backend=backend)
    of_model = uncached.setdefault(str((shape, ablation)), [])
    of_model += [
        reference(model, list(one.prompt), one.sampling, tokenizer.eos_id)
        for one in requests[len(of_model) :]
    ]
    for generation, expected in zip(run(engine, requests), of_model, strict=True):
        assert generation.tokens == expected
        assert generation.text == tokenizer.decode(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_hugging_faces_at_every_position(
    tokenizer: Tokenizer, backend: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel

    model = random_gpt(tokenizer, **shape)
    save_pretrained(model, tmp_path, eos_token_id=tokenizer.eos_id)
    ids = prompt_of(tokenizer, model.config.n_positions, seed=1)
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path)(torch.tensor([ids])).logits[0]
    decoder = network(backend, model, 2, torch.float32)
    V = tokenizer.vocab_size
    # A prompt in two pieces, then token after token; a neighbour decodes meanwhile.
    read = len(ids) // 3
    first = decoder.step(StepRows([], [Piece(0, 0, ids[: read - 2])])).clone()
    second = decoder.step(StepRows([], [Piece(0, read - 2, ids[read - 2 : read])]))
    torch.testing.assert_close(first[0, :V], expected[read - 3], atol=1e-4, rtol=0)
    torch.testing.assert_close(second[0, :V], expected[read - 1], atol=1e-4, rtol=0)
    for position in range(read, len(ids)):
        pieces = [Piece(1, 0, ids[:4])] if position == read else []
        logits = decoder.step(StepRows([(ids[position], position)], pieces))
        torch.testing.assert_close(logits[0, :V], expected[position], atol=1e-4, rtol=0)
        if pieces:
            torch.testing.assert_close(logits[1, :V], expected[3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_is_hugging_faces_generate(
    tokenizer: Tokenizer, shape: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel

    model = random_gpt(tokenizer, **shape)
    save_pretrained(model, tmp_path, eos_token_id=tokenizer.eos_id)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    sampling = Sampling(temperature=0, max_new_tokens=30, utf8=False)
    prompts = [prompt_of(tokenizer, length, seed=length) for length in (1, 2, 9, 30)]
    ours = run(Engine(model, tokenizer), [Sequence(prompt, sampling) for prompt in prompts])
    for prompt, generation in zip(prompts, ours, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=tokenizer.eos_id,
        )[0, len(prompt) :].tolist()
        if tokenizer.eos_id in output:
            output = output[: output.index(tokenizer.eos_id)]
        assert generation.tokens == output


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_gets_the_same_tokens_alone_and_among_63_others(
    tokenizer: Tokenizer, backend: str
) -> None:
    model = random_gpt(tokenizer, n_embd=64, n_positions=150)
    requests = mixed_requests(tokenizer, 64, 150, most=15)
    together = run(Engine(model, tokenizer, max_batch_size=64, backend=backend), requests)
    few_at_a_time = run(
        Engine(model, tokenizer, max_batch_size=3, backend=backend), requests[::-1]
    )[::-1]
    for request, one, other in zip(requests, together, few_at_a_time, strict=True):
        alone = run(Engine(model, tokenizer, max_batch_size=1, backend=backend), [request])[0]
        assert alone.tokens == one.tokens == other.tokens
        assert alone.finish_reason == one.finish_reason == other.finish_reason


@pytest.fixture
def as_after_training() -> Iterator[None]:
    """Let products be computed as training lets them, in the whole process."""
    before = torch.get_float32_matmul_precision()
    enable_fast_fp32()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("backend", "dtype", "quantize"),
    [
        ("torch", torch.float32, "none"),
        ("torch", torch.float32, "int8"),
        ("torch", torch.float32, "int4"),
        pytest.param("native", torch.float32, "none", marks=needs_native),
        pytest.param("native", torch.bfloat16, "none", marks=needs_native),
        pytest.param("native", torch.bfloat16, "int8", marks=needs_native),
        pytest.param("native", torch.bfloat16, "int4", marks=needs_native),
        pytest.param("native", torch.bfloat16, "iq4_nl", marks=needs_native),
    ],
)
@pytest.mark.parametrize("choices", [{}, MODERN], ids=["gpt2", "modern"])
def test_logits_are_bit_for_bit_those_of_a_row_alone(
    tokenizer: Tokenizer,
    backend: str,
    dtype: torch.dtype,
    quantize: str,
    choices: dict[str, Any],
    as_after_training: None,
) -> None:
    shape = {"n_embd": 60, "n_head": 4, "n_inner": 100, "n_positions": 200, **choices}
    model = random_gpt(tokenizer, **shape)
    prompts = [prompt_of(tokenizer, length, seed=length) for length in (3, 17, 64, 65, 128)]

    def logits_of(prompts: list[list[int]]) -> torch.Tensor:
        decoder = network(backend, model, 5, dtype, quantize)
        decoder.step(StepRows([], [Piece(i, 0, prompt) for i, prompt in enumerate(prompts)]))
        return decoder.step(StepRows([(5, len(prompt)) for prompt in prompts], []))

    together = logits_of(prompts)
    for i, prompt in enumerate(prompts):
        assert torch.equal(logits_of([prompt])[0], together[i])


@needs_native
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, "none"), *((torch.bfloat16, kind) for kind in ("none", "int8", "int4"))],
)
@pytest.mark.parametrize("choices", [{}, MODERN], ids=["gpt2", "modern"])
def test_native_logits_are_bit_for_bit_the_same_however_a_prompt_was_read(
    tokenizer: Tokenizer, dtype: torch.dtype, quantize: str, choices: dict[str, Any]
) -> None:
    model = random_gpt(tokenizer, n_embd=44, n_head=4, n_positions=200, **choices)
    prompt = prompt_of(tokenizer, 120, seed=1)
    at_once, in_pieces, by_tokens = (network("native", model, 1, dtype, quantize) for _ in range(3))
    (expected,) = at_once.step(StepRows([], [Piece(0, 0, prompt)]))
    in_pieces.step(StepRows([], [Piece(0, 0, prompt[:7])]))
    assert torch.equal(in_pieces.step(StepRows([], [Piece(0, 7, prompt[7:])]))[0], expected)
    by_tokens.step(StepRows([], [Piece(0, 0, prompt[:1])]))
    for position in range(1, len(prompt)):
        logits = by_tokens.step(StepRows([(prompt[position], position)], []))
    assert torch.equal(logits[0], expected)


def test_rows_of_one_prompt_differ_and_seeds_repeat(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    request = Sequence([5, 6], Sampling(max_new_tokens=20, temperature=2.0, seed=3))
    same, again, other_row, other_seed = run(
        Engine(model, tokenizer),
        [
            request,
            request,
            replace(request, sample=1),
            replace(request, sampling=replace(request.sampling, seed=4)),
        ],
    )
    assert same.tokens == again.tokens
    assert len({tuple(g.tokens) for g in (same, other_row, other_seed)}) == 3


def test_a_full_context_ends_with_length(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    sampling = Sampling(max_new_tokens=64, temperature=0, min_new_tokens=64)
    (generation,) = run(Engine(model, tokenizer), [Sequence([1] * 60, sampling)])
    assert len(generation.tokens) == 4 and generation.finish_reason == "length"


def test_end_of_text_ends_its_row_alone_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, initializer_range=0.02)
    # Near-uniform logits: within 60 draws some rows end and some do not.
    requests = [
        Sequence([1, 2], Sampling(max_new_tokens=60, temperature=1.0, seed=seed))
        for seed in range(40)
    ]
    generations = run(Engine(model, tokenizer, max_batch_size=40), requests)
    reasons = {g.finish_reason for g in generations}
    assert reasons == {"stop", "length"}
    for generation in generations:
        assert tokenizer.eos_id not in generation.tokens
        assert (generation.finish_reason == "length") == (len(generation.tokens) == 60)


def test_stop_strings_end_a_row_and_are_cut(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    request = Sequence([1, 2], Sampling(max_new_tokens=40, temperature=1.5, seed=1))
    (whole,) = run(Engine(model, tokenizer), [request])
    stop = whole.text[5:8]
    stopped = run(
        Engine(model, tokenizer),
        [replace(request, sampling=replace(request.sampling, stop=(stop,)))],
    )[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) < len(whole.tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_token_ends_its_row_alone_and_in_any_batch(
    tokenizer: Tokenizer, backend: str, kept: bool
) -> None:
    free = Engine(random_gpt(tokenizer), tokenizer, max_batch_size=8, backend=backend)
    asked = [
        Sequence([1, 2, i], Sampling(max_new_tokens=30, temperature=1.2, seed=i, top_k=40))
        for i in range(8)
    ]
    whole, stopping = run(free, asked), []
    for sequence, one in zip(asked, whole, strict=True):
        ids = (one.tokens[7], 0)
        sampling = replace(
            sequence.sampling, stop_token_ids=ids, include_stop_str_in_output=kept, ignore_eos=True
        )
        stopping.append(replace(sequence, sampling=sampling))
    together = run(free, stopping)
    for sequence, one, row in zip(stopping, whole, together, strict=True):
        stop, _ = sequence.sampling.stop_token_ids
        at = one.tokens.index(stop)
        assert row.tokens == one.tokens[: at + kept]
        assert (row.finish_reason, row.stop_reason) == ("stop", stop)
        assert row.new_tokens == at + 1 and (row.end is None) == kept
        assert row.text == one.text[: len(row.text)]
        (alone,) = run(free, [sequence])
        assert (alone.text, alone.tokens) == (row.text, row.tokens)
    least = [replace(one, sampling=replace(one.sampling, min_new_tokens=12)) for one in stopping]
    for sequence, row in zip(least, run(free, least), strict=True):
        assert row.new_tokens >= 12 and not {*sequence.sampling.stop_token_ids} & {*row.tokens[:12]}
        (alone,) = run(free, [sequence])
        assert alone.tokens == row.tokens


def test_a_stop_token_inside_a_character_leaves_no_part_of_it(tokenizer: Tokenizer) -> None:
    engine, syllable = Engine(random_gpt(tokenizer), tokenizer), tokenizer.encode("\uac02")
    assert len(syllable) == 3, "a syllable of three tokens"
    for length, live in ((2, False), (3, True)):
        *ids, stop = syllable[:length]
        bias = tuple((token, 100.0) for token in {*ids, stop})
        sampling = Sampling(logit_bias=bias, stop_token_ids=(stop,), max_new_tokens=30, seed=3)
        row = run(engine, [Sequence([1, 2], sampling, live_text=live)])[0]
        assert row.stop_reason == stop and "\ufffd" not in row.text
        broken = replace(sampling, utf8=False)
        assert "\ufffd" in run(engine, [Sequence([1, 2], broken)])[0].text


def test_no_stop_string_ends_a_row_before_its_least_tokens(tokenizer: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.5, seed=1, min_new_tokens=20)
    stops = tuple(string.ascii_letters + " ")  # one of them ends almost every token
    (row,) = run(
        Engine(random_gpt(tokenizer), tokenizer),
        [Sequence([1, 2], replace(sampling, stop=stops))],
    )
    assert row.finish_reason == "stop" and 20 < row.new_tokens < 40


def test_live_text_grows_as_tokens_come(tokenizer: Tokenizer) -> None:
    engine = Engine(random_gpt(tokenizer), tokenizer)
    request = Sequence([1, 2], Sampling(max_new_tokens=10, seed=1), live_text=True)
    generation = engine.submit(request)
    counts, texts = [], []
    while not generation.ended:
        engine.step()
        counts.append(len(generation.tokens))
        texts.append(generation.text)
    assert counts == sorted(set(counts)) and counts[-1] > 1
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    assert not engine.busy


def test_cancelled_rows_leave_at_once_and_others_are_untouched(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, n_positions=300)
    requests = mixed_requests(tokenizer, 8, 300)
    requests[4] = Sequence(prompt_of(tokenizer, 290, 4), Sampling(max_new_tokens=9))
    expected = run(Engine(model, tokenizer, max_batch_size=8), requests)
    engine = Engine(model, tokenizer, max_batch_size=4)
    generations = [engine.submit(replace(request)) for request in requests]
    engine.step()
    engine.cancel(generations[0])
    engine.cancel(generations[7])
    assert generations[0].finish_reason == generations[7].finish_reason == "cancelled"
    running = engine.running
    while generations[4].finish_reason is None and not engine._prefilling:  # noqa: SLF001
        engine.step()
    engine.cancel(generations[4])
    while engine.busy:
        engine.step()
    assert running <= 3
    for i in (1, 2, 3, 5, 6):
        assert generations[i].tokens == expected[i].tokens


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Sequence([]), "empty"),
        (Sequence([1] * 64), "too long"),
        (Sequence([1] * 6400), "too long"),
        (Sequence([10**6]), "outside"),
        (Sequence([1], Sampling(stop_token_ids=(10**6,))), "stop_token_ids names .* outside 0"),
    ],
    ids=["empty", "full", "too long", "unknown", "unknown stop"],
)
def test_what_cannot_run_is_refused_at_once(
    tokenizer: Tokenizer, request_: Sequence, message: str
) -> None:
    engine = Engine(random_gpt(tokenizer), tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_logits_are_not_finite_ends_alone(tokenizer: Tokenizer, backend: str) -> None:
    model = random_gpt(tokenizer)
    requests = [
        Sequence(prompt_of(tokenizer, 4 * i + 1, i), Sampling(max_new_tokens=3, ignore_eos=True))
        for i in range(10)
    ]
    requests[9] = replace(requests[9], prompt_logprobs=0)
    expected = run(Engine(model, tokenizer, backend=backend), requests)
    with torch.no_grad():
        model.transformer.wpe.weight[20] = float("nan")
    for generation, before in zip(
        run(Engine(model, tokenizer, backend=backend), requests), expected, strict=True
    ):
        if len(before.prompt) + 2 < 20:
            assert generation.tokens == before.tokens and generation.error is None
        else:
            assert generation.finish_reason == "error"
            assert generation.error and "not finite" in generation.error


def test_a_row_that_breaks_a_step_ends_alone_and_the_others_get_their_text(
    tokenizer: Tokenizer,
) -> None:
    model, positions = random_gpt(tokenizer, n_positions=256), 150
    lengths = [3, 149, 10, 200, 140, 1, 130, 145, 129, 160]
    requests = [
        Sequence(
            prompt_of(tokenizer, length, i), Sampling(max_new_tokens=8, seed=i, min_new_tokens=8)
        )
        for i, length in enumerate(lengths)
    ]
    requests[4] = replace(requests[4], prompt_logprobs=2)
    expected = run(Engine(model, tokenizer, max_batch_size=4), requests)
    # What lies beyond cannot be looked up: the network raises, for all rows of its step.
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:positions]
    engine = Engine(model, tokenizer, max_batch_size=4)
    for generation, before in zip(run(engine, requests), expected, strict=True):
        if len(before.prompt) + 7 <= positions:
            assert generation.error is None and generation.tokens == before.tokens
            assert [d.token for d in generation.scored] == [d.token for d in before.scored]
        else:
            assert generation.finish_reason == "error"
            assert generation.error and "IndexError: index out of range" in generation.error
    assert {g.finish_reason for g in run(engine, requests[:1])} == {"length"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_never_reaches_those_that_follow(
    tokenizer: Tokenizer, backend: str
) -> None:
    model = random_gpt(tokenizer, n_positions=256)
    engine = Engine(model, tokenizer, max_batch_size=3, backend=backend)
    lengths = [30, 3, 200, 5, 40, 7, 9, 30, 2, 4]
    requests = [
        Sequence(prompt_of(tokenizer, length, i), Sampling(max_new_tokens=9, ignore_eos=True))
        for i, length in enumerate(lengths)
    ]
    expected = run(engine, requests)
    with torch.no_grad():
        model.transformer.wpe.weight[20] = float("nan")
    engine = Engine(model, tokenizer, max_batch_size=3, backend=backend)
    for generation, before in zip(run(engine, requests), expected, strict=True):
        is_sound = len(before.prompt) < 20
        assert generation.finish_reason == ("length" if is_sound else "error")
        assert generation.tokens == before.tokens or not is_sound


def test_a_step_tells_every_end_though_a_row_breaks_its_draw(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    with torch.no_grad():
        model.transformer.wpe.weight[20] = float("nan")
    engine = Engine(model, tokenizer)
    scored = Sequence(prompt_of(tokenizer, 30, 0), prompt_logprobs=0)
    # Its bias is for a token that the model has not: the sampler raises, for all rows of its step.
    broken = Sequence([1], Sampling(logit_bias=((9999, 1.0),)))
    broken.is_checked = True
    plain = Sequence([2, 3], Sampling(max_new_tokens=3, ignore_eos=True))
    for sequence in (scored, broken, plain):
        engine.submit(sequence)
    ended = list[Sequence]()
    while engine.busy:
        ended += [sequence for sequence in engine.step() if sequence.ended]
    assert set(ended) == {scored, broken, plain} and len(ended) == 3
    assert scored.error and "not finite" in scored.error
    assert broken.error and "IndexError" in broken.error
    assert plain.finish_reason == "length"


def test_an_engine_for_which_no_single_row_is_to_blame_raises(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:0]
    engine = Engine(model, tokenizer)
    with pytest.raises(RuntimeError, match="self indexing axis"):
        run(engine, [Sequence([1, 2]), Sequence([3])])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_a_step_that_fails_for_all_loses_no_row(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = random_gpt(tokenizer, n_positions=256)
    requests = [
        Sequence(prompt_of(tokenizer, length, i), Sampling(max_new_tokens=4, seed=i))
        for i, length in enumerate([3, 200, 5, 140, 4])
    ]
    expected = run(Engine(model, tokenizer), requests)
    engine = Engine(model, tokenizer, max_batch_size=2)
    queued = [engine.submit(replace(one)) for one in requests]

    def failing(*given: object, **named: object) -> None:
        raise error

    while engine.busy:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "softmax", failing)
            with pytest.raises(error):
                engine.step()
        engine.step()
    assert [one.tokens for one in queued] == [one.tokens for one in expected]


@pytest.mark.parametrize(
    "backend,nth",
    [("torch", nth) for nth in range(4)]
    + [pytest.param("native", nth, marks=needs_native) for nth in range(2)],
)
def test_a_cache_with_no_memory_to_grow_stays_as_it_is(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, backend: str, nth: int
) -> None:
    model = random_gpt(tokenizer, n_positions=1300)
    greedy = Sampling(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    requests = [Sequence(prompt_of(tokenizer, n, n), greedy) for n in (3, 1023, 1200)]
    expected = run(Engine(model, tokenizer, backend=backend), requests)
    engine = Engine(model, tokenizer, max_batch_size=3, backend=backend)
    queued = [engine.submit(replace(one)) for one in requests]
    sizes = count()
    zeros, empty = torch.Tensor.new_zeros, np.empty

    def new_zeros(like: torch.Tensor, *shape: Any) -> torch.Tensor:
        if next(sizes) == nth:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(like, *shape)

    def new_bytes(shape: Any, dtype: Any = float) -> Any:
        if dtype is np.uint8 and next(sizes) == nth:
            raise MemoryError
        return empty(shape, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_zeros", new_zeros)
        patched.setattr(np, "empty", new_bytes)
        with pytest.raises((MemoryError, torch.OutOfMemoryError)):
            engine.run([])
    assert next(sizes) == nth + 1
    engine.run([])
    assert [one.tokens for one in queued] == [one.tokens for one in expected]


def test_padded_entries_of_the_vocabulary_are_never_drawn(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, vocab_size=512)
    sampling = Sampling(max_new_tokens=60, temperature=50.0)
    for generation in run(Engine(model, tokenizer), [Sequence([1], sampling)] * 4):
        assert max(generation.tokens) < tokenizer.vocab_size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "quantize", "most"),
    [
        (torch.bfloat16, "none", 0.03),
        (torch.bfloat16, "int8", 0.03),
        (torch.float32, "int8", 0.03),
        (torch.bfloat16, "int4", 0.25),
        (torch.float32, "int4", 0.25),
        (torch.bfloat16, "iq4_nl", 0.2),
    ],
)
@pytest.mark.parametrize("rows", [1, 9])
def test_bf16_and_quantized_weights_stay_close_to_fp32(
    tokenizer: Tokenizer, backend: str, dtype: torch.dtype, quantize: str, most: float, rows: int
) -> None:
    model: GPT = random_gpt(tokenizer, n_embd=64, initializer_range=0.1)
    prompts = [prompt_of(tokenizer, 20, seed=seed) for seed in range(rows)]

    def next_logits(backend: str, dtype: torch.dtype, quantize: str) -> torch.Tensor:
        decoder = network(backend, model, rows, dtype, quantize)
        decoder.step(StepRows([], [Piece(i, 0, prompt) for i, prompt in enumerate(prompts)]))
        logits = decoder.step(StepRows([(5, 20)] * rows, [])).float()
        return logits[:, : tokenizer.vocab_size]

    exact = next_logits("torch", torch.float32, "none")
    error = (next_logits(backend, dtype, quantize) - exact).norm() / exact.norm()
    assert 0 < error < most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choices", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("kind", ["int4", "iq4_nl"])
def test_4_bits_compute_with_what_the_stored_weights_are(
    tokenizer: Tokenizer, backend: str, choices: dict[str, Any], kind: str
) -> None:
    model = random_gpt(tokenizer, n_embd=40, n_head=2, initializer_range=0.1, **choices)
    stored = random_gpt(tokenizer, n_embd=40, n_head=2, initializer_range=0.1, **choices)
    with torch.no_grad():
        for one in (model, stored):  # what layers read is of different sizes
            for name, weight in one.named_parameters():
                if name.endswith(("ln_1.weight", "ln_2.weight")):
                    weight.mul_(torch.linspace(0.25, 4, len(weight)))
        counts = input_importance(stored, kind)
        for name, layer in stored.named_modules():
            if isinstance(layer, torch.nn.Linear):
                rounded = quantize_weight(layer.weight, kind, counts[f"{name}.weight"])
                layer.weight.copy_(rounded.dequantize())
    prompt = prompt_of(tokenizer, 20, seed=1)

    def logits_of(model: GPT, backend: str, quantize: str) -> torch.Tensor:
        decoder = network(backend, model, 1, torch.float32, quantize)
        return decoder.step(StepRows([], [Piece(0, 0, prompt)]))[:, : tokenizer.vocab_size].float()

    exact = logits_of(stored, "torch", "none")
    error = (logits_of(model, backend, kind) - exact).norm() / exact.norm()
    # Beside the weights only the head is rounded, and on some backends what meets weights.
    assert error < 0.03
    # What was rounded once, as an export holds it, is rounded no more.
    again = logits_of(stored, backend, kind)
    assert torch.equal(again, logits_of(model, backend, kind))
