"""The sampler: exact distributions, exactly k candidates, rows that know nothing of each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from gptray.generation.choosing import top_candidates
from gptray.generation.native_decoder import draw_ranked_rows as native_draw_ranked_rows
from gptray.generation.native_decoder import top_candidates as native_top_candidates
from gptray.generation.philox import uniform
from gptray.generation.sampling import draw
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from tests.generation.models import BACKENDS, drawing, needs_native

V = 200


def rows_of(
    sampling: Sampling, count: int, history: tuple[int, ...] = (1, 2), row: int = 0
) -> list[Sequence]:
    """`count` rows that differ in their seed only."""
    return [
        drawing(replace(sampling, seed=seed), len(history), list(history), 0, row)
        for seed in range(count)
    ]


def tokens(logits: Tensor, rows: list[Sequence]) -> list[int]:
    return [drawn.token for drawn in draw(logits.clone(), rows) if drawn]


def some_logits(rows: int = 1, entries: int = V, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, entries, generator=torch.Generator().manual_seed(seed)) * 2


def exact(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that transformers' own processors leave, (V,)."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    ids = cast(torch.LongTensor, torch.tensor([[1, 2]]))
    scores = steps(ids, cast(torch.FloatTensor, logits.clone()))
    return torch.softmax(scores.double(), dim=-1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=7),
        Sampling(top_k=2000, temperature=3.0),
        Sampling(top_k=2000, top_p=0.6, temperature=3.0),
        Sampling(top_p=0.9, temperature=4.0),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(top_k=20, top_p=0.7, min_p=0.05, temperature=0.9, repetition_penalty=1.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("entries", [V, 3000])
def test_samples_follow_the_exact_distribution(sampling: Sampling, entries: int) -> None:
    logits = some_logits(entries=entries)
    probabilities = exact(logits, sampling).numpy()
    draws = 20_000 if entries == V else 8000
    got = np.zeros(entries)
    for begin in range(0, draws, 2000):
        rows = rows_of(sampling, 2000, row=begin)
        got += np.bincount(tokens(logits.expand(2000, entries), rows), minlength=entries)
    assert got[probabilities == 0].sum() == 0
    expected = probabilities * draws
    common = expected >= 5
    observed = np.append(got[common], got[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    wanted, observed = wanted[wanted > 0], observed[wanted > 0]
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # 99.99 % of the distribution lies below (Wilson and Hilferty 1931).
    freedom = max(len(wanted) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit, (chi_square, limit)


@pytest.mark.parametrize("more", [{}, {"top_k": 7}, {"min_p": 0.1}], ids=str)
def test_a_top_p_of_0_leaves_the_likeliest_token(more: dict[str, float]) -> None:
    logits = some_logits(400)
    likeliest = tokens(logits.clone(), rows_of(Sampling(temperature=0), 400))
    rows = rows_of(Sampling(top_p=0, temperature=4.0, **more), 400)  # type: ignore[arg-type]
    assert tokens(logits, rows) == likeliest


@pytest.mark.parametrize("entries", [V, 5000])
def test_exactly_k_tokens_are_eligible_though_all_are_tied(entries: int) -> None:
    rows = rows_of(Sampling(top_k=3), 400)
    assert set(tokens(torch.zeros(400, entries), rows)) == {0, 1, 2}


def test_a_tie_at_the_border_goes_to_the_lower_ids() -> None:
    logits = torch.full((1, 5000), -1.0)
    logits[0, [4000, 77, 4999, 1234]] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    assert top_candidates(logits, 3)[1].tolist() == [[4000, 77, 1234]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entries", [3, 64, 100, 4096, 50257])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_candidates_are_those_of_a_stable_sort(backend: str, entries: int, k: int) -> None:
    top = native_top_candidates if backend == "native" else top_candidates
    # bf16 leaves many ties; -inf and both zeros are values as any.
    logits = some_logits(3, entries).bfloat16().float()
    logits[0, ::3], logits[1, ::2], logits[1, 1::4] = float("-inf"), 0.0, -0.0
    logits[2, :1], logits[2, 3:-2] = float("-inf"), float("-inf")  # as of a masked row
    values, ids = top(logits, k)
    expected = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = some_logits(4)
    logits[2, [9, 5]] = 50.0
    got = tokens(logits, rows_of(Sampling(temperature=0), 4))
    assert got == logits.argmax(-1).tolist() and got[2] == 5


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    settings = [
        Sampling(top_k=5, seed=1),
        Sampling(top_p=0.9, seed=2),
        Sampling(seed=3),
        Sampling(temperature=0),
        Sampling(top_k=1500, top_p=0.99, seed=4, temperature=3.0),
        Sampling(min_p=0.02, seed=5, repetition_penalty=1.3),
        Sampling(top_p=0.9999, temperature=5.0, seed=6),
        Sampling(top_k=5, seed=7, min_new_tokens=9, max_new_tokens=9),
        Sampling(top_k=5, seed=8, presence_penalty=1.5, logit_bias=((3, 2.0),)),
        Sampling(seed=9, frequency_penalty=-1.5, repetition_penalty=0.6, logprobs=2),
    ]
    rows = [drawing(sampling, 2, [3, 4, 5 + i], eos_id=0) for i, sampling in enumerate(settings)]
    logits = some_logits(len(rows), 3000)
    alone = [tokens(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    together = tokens(logits, rows)
    backwards = tokens(logits.flip(0), rows[::-1])[::-1]
    assert alone == together == backwards


def test_positions_and_rows_have_streams_of_their_own() -> None:
    numbers = uniform([7] * 1000 + [8] * 1000, [0] * 1000 + [1] * 1000, list(range(1000)) * 2)
    assert len(set(numbers.tolist())) == 2000
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.02
    assert torch.equal(uniform([7], [0], [5]), numbers[5:6])


def test_random_numbers_are_philox() -> None:
    # The published test vector of Philox4x32-10 for counter and key all ones, first two words.
    ones = 2**64 - 1
    words = 0x408F276D << 32 | 0x41C83B0E
    assert uniform([ones], [ones], [ones]).item() == (words >> 11) * 2.0**-53


def test_end_of_text_waits_for_min_new_tokens() -> None:
    logits = torch.zeros(1, V)
    logits[0, 9] = 10.0
    sampling = Sampling(temperature=0, min_new_tokens=2)
    assert tokens(logits, [drawing(sampling, 2, [1, 2, 3], eos_id=9)]) == [0]
    assert tokens(logits, [drawing(sampling, 2, [1, 2, 3, 4], eos_id=9)]) == [9]


def plainly_shaped(logits: list[float], row: Sequence) -> list[float]:
    """Bias, penalties and minimum length, an entry at a time."""
    sampling, output = row.sampling, row.history[row.prompt_tokens :]
    shaped = []
    for token, value in enumerate(logits):
        value += dict(sampling.logit_bias).get(token, 0.0)
        if token in row.history:
            penalty = sampling.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        if token in output:
            value -= sampling.frequency_penalty * list(output).count(token)
            value -= sampling.presence_penalty
        if token in row.ends and row.new_tokens < sampling.min_new_tokens:
            value = -math.inf
        shaped.append(value)
    return shaped


@pytest.mark.parametrize("history", [[1, 2, 2], [1, 2, 2, 5, 6, 6, 6, 7, 5]], ids=len)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(presence_penalty=1.0),
        Sampling(frequency_penalty=-0.7),
        Sampling(frequency_penalty=0.5, presence_penalty=-1.5, repetition_penalty=1.4),
        Sampling(logit_bias=((3, 2.5), (6, -100.0), (2, 1.5)), repetition_penalty=0.7),
        Sampling(logit_bias=((8, 100.0),), min_new_tokens=4, presence_penalty=2.0),
    ],
    ids=str,
)
def test_penalties_and_bias_are_those_of_a_plain_loop(
    sampling: Sampling, history: list[int]
) -> None:
    logits = some_logits(300, 9)
    rows = [drawing(replace(sampling, temperature=0), 3, history, eos_id=8)] * 300
    plain = torch.tensor([plainly_shaped(row.tolist(), rows[0]) for row in logits])
    assert tokens(logits, rows) == plain.argmax(-1).tolist()
    is_changed = bool((plain.argmax(-1) != logits.argmax(-1)).any())
    # Penalties on the output do nothing before there is one.
    assert is_changed or len(history) == 3


def test_logprobs_are_the_models_own() -> None:
    logits = some_logits(2)
    sampling = Sampling(
        top_k=1,
        temperature=0.1,
        logprobs=3,
        logit_bias=((4, 3.0),),
        repetition_penalty=2.0,
        presence_penalty=2.0,
        min_new_tokens=1,
    )
    rows = rows_of(sampling, 2)
    expected = torch.log_softmax(logits, -1)
    for drawn, row in zip(draw(logits.clone(), rows), expected, strict=True):
        assert drawn
        assert drawn.logprob == pytest.approx(row[drawn.token].item(), abs=1e-6)
        assert [token for token, _ in drawn.top] == row.topk(3).indices.tolist()
    plain = draw(logits, rows_of(Sampling(logprobs=0), 2))[0]
    assert plain and plain.top == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(), Sampling(top_k=4), Sampling(temperature=0), Sampling(top_p=0.9, logprobs=2),
        Sampling(min_p=0.1, temperature=100.0),
    ],
    ids=str,
)  # fmt: skip
def test_only_the_row_whose_logits_are_not_finite_draws_nothing(
    backend: str, sampling: Sampling, value: float
) -> None:
    faster = (native_top_candidates, native_draw_ranked_rows) if backend == "native" else ()
    logits = some_logits(3, 3000)
    expected = draw(logits.clone(), rows_of(sampling, 3), *faster)
    logits[1] = value
    got = draw(logits, rows_of(sampling, 3), *faster)
    assert got == [expected[0], None, expected[2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])  # x86 makes the negative one
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=4), Sampling(temperature=0)])
@pytest.mark.parametrize("entries", [50, 3000])
def test_a_row_with_a_single_nan_draws_nothing(
    backend: str, sign: int, sampling: Sampling, entries: int
) -> None:
    faster = (native_top_candidates, native_draw_ranked_rows) if backend == "native" else ()
    logits = some_logits(2, entries)
    logits[1, entries - 3] = math.copysign(math.nan, sign)
    first, second = draw(logits, rows_of(sampling, 2), *faster)
    assert first
    assert second is None


@needs_native
@pytest.mark.parametrize("entries", [V, 5000])
@pytest.mark.parametrize(
    "limits",
    [
        {}, {"top_p": 0.9}, {"top_p": 1e-320}, {"top_p": 0.0}, {"min_p": 0.05}, {"min_p": 1.0},
        {"temperature": 1e-5}, {"temperature": 100.0, "top_p": 0.999, "min_p": 0.01},
    ],
    ids=str,
)  # fmt: skip
def test_the_native_library_draws_the_same_tokens(limits: dict[str, float], entries: int) -> None:
    ks, seeds = (1, 2, 50, 300, 2**31 - 1), (0, 1, 2**63 - 1)
    rows = [
        drawing(Sampling(top_k=k, seed=seed, **limits), 2, [1] * (2 + k % 7), 0, 2**40 + seed % 5)  # type: ignore[arg-type]
        for k in ks
        for seed in seeds
    ]
    logits = some_logits(len(rows), entries).bfloat16().float()  # with many ties
    logits[::2, 1::2], logits[7, :] = float("-inf"), 0.0
    top = native_top_candidates
    expected = [draw(one[None].clone(), [row], top) for one, row in zip(logits, rows, strict=True)]
    assert draw(logits, rows, top, native_draw_ranked_rows) == [one for (one,) in expected]
    # A row without a top_k takes PyTorch's way for all of them.
    mixed = [*rows, drawing(Sampling(top_p=0.9), 2, [1, 2], 0)]
    more = torch.cat([logits, logits[:1]])
    drawn = draw(more.clone(), mixed, top, native_draw_ranked_rows)
    assert drawn == draw(more, mixed, top)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-50}, {"temperature": 1e-5}, {"temperature": 100.0},
        {"temperature": 1e-5, "top_k": 2**31 - 1}, {"temperature": 1e-5, "top_p": 1e-320},
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100.0, "min_p": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_extreme_settings_draw_from_the_vocabulary(extreme: dict[str, float]) -> None:
    logits = some_logits(400, 300) * 50
    drawn = tokens(logits, rows_of(Sampling(**extreme), 400))  # type: ignore[arg-type]
    assert len(drawn) == 400 and all(0 <= token < 300 for token in drawn)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0}, {"top_k": 1.5}, {"temperature": -0.1}, {"temperature": float("nan")},
        {"temperature": float("inf")}, {"temperature": 1e300}, {"top_k": 2**63},
        {"repetition_penalty": 1e-38}, {"max_new_tokens": 2**31},
        {"logit_bias": tuple((token, 1.0) for token in range(1025))},
        {"logit_bias": ((True, 1.0),)}, {"top_p": -0.1}, {"top_p": 1.1}, {"min_p": -1.0},
        {"repetition_penalty": 0.0}, {"max_new_tokens": -1}, {"seed": -1}, {"seed": 2**63},
        {"stop": ("",)}, {"min_new_tokens": 65}, {"logprobs": -1}, {"top_k": True},
        {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")},
        {"logit_bias": ((3, 101.0),)}, {"logit_bias": ((-3, 1.0),)},
        {"logit_bias": ((3, 1.0), (3, 1.0))},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
