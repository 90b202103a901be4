"""Losses of whole splits: a plain transformers loop says the same, however the work is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gptray.data.scoring import Windows
from gptray.data.tokens import TokenSplit
from gptray.evaluation.metrics import (
    DocumentSums,
    document_ends,
    losses,
    scoring_dtype,
    split_result,
    sum_windows,
)
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained
from gptray.training.validation import score_split
from gptray.training.workers import Workers
from tests.evaluation.splits import split_of

EOS = 0
SHAPES = [
    {"n_layer": 3, "n_head": 3, "n_embd": 33, "n_positions": 37, "vocab_size": 301},
    {"n_layer": 1, "n_head": 5, "n_embd": 40, "n_inner": 50, "n_positions": 24, "vocab_size": 517},
]


@pytest.fixture(scope="module", params=SHAPES, ids=["33 wide", "40 wide"])
def hf_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT2LMHeadModel, GPT]:
    """Random weights as transformers saved them, opened by both."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(**request.param, initializer_range=0.3))
    model.train(False)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, load_pretrained(folder).eval()


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """Eight documents of 1 to 90 tokens, in two files."""
    rng = np.random.default_rng(2)
    documents = [[*rng.integers(1, 300, size).tolist(), EOS] for size in (40, 3, 90, 1, 17, 64, 30)]
    return split_of(tmp_path / "split", [t for document in documents for t in document] + [7, 8, 9])


def scored(
    model: GPT,
    split: TokenSplit,
    windows: Windows,
    batch_size: int = 4,
    others: Sequence[GPT] = (),
    numbers: Sequence[int] | None = None,
) -> DocumentSums:
    (sums,) = sum_windows(
        partial(losses, [model, *others]),
        split,
        windows,
        range(len(windows)) if numbers is None else numbers,
        ends=document_ends(split, EOS),
        batch_size=batch_size,
        device=model.device,
    )
    return sums


@torch.no_grad()
def plain_losses(model: GPT2LMHeadModel, tokens: list[int], block: int, stride: int) -> list[float]:
    """Each token's loss but the first's: Hugging Face's sliding window, one at a time."""
    losses: list[float] = []
    inputs, targets = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    for begin in range(0, len(inputs), stride):
        end = min(begin + block, len(inputs))
        logits = model(inputs[None, begin:end]).logits[0]
        each = F.cross_entropy(logits.double(), targets[begin:end], reduction="none")
        losses += each[len(losses) - begin :].tolist()
        if end == len(inputs):
            break
    return losses


@pytest.mark.parametrize("part", [1, 2, 3])
def test_losses_equal_a_plain_transformers_loop(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit, part: int
) -> None:
    theirs, ours = hf_model
    block = theirs.config.n_positions
    windows = Windows(len(split), block, block // part)
    losses = plain_losses(theirs, split.slice(0, len(split)).tolist(), block, block // part)
    sums = scored(ours, split, windows)
    result = split_result(sums, split, windows, range(len(windows)))
    assert result["tokens"] == len(losses) == len(split) - 1
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"]))
    bits = result["loss"] * result["tokens"] / (math.log(2) * split.bytes)
    assert result["bpb"] == pytest.approx(bits)


def test_several_models_score_by_the_average_of_their_probabilities(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit
) -> None:
    theirs, ours = hf_model
    other = GPT(ours.config, vocab_size=theirs.config.vocab_size)
    tokens = torch.from_numpy(split.slice(0, len(split)).astype(np.int64))
    windows = Windows(len(split), 20, 20)
    likely = []
    with torch.no_grad():
        for begin in range(0, len(split) - 1, 20):
            idx = tokens[begin : min(begin + 20, len(split) - 1)]
            each = [model.eval()(idx[None])[0].double().softmax(-1) for model in (ours, other)]
            probability = (each[0] + each[1]) / 2
            likely += probability[range(len(idx)), tokens[begin + 1 :][: len(idx)]].tolist()
    sums = scored(ours, split, windows, others=[other])
    assert sums.nats.sum() == pytest.approx(-np.log(likely).sum(), abs=1e-4)
    alone = scored(ours, split, windows)
    assert scored(ours, split, windows, others=[ours]).nats == pytest.approx(alone.nats, rel=1e-12)


def test_neither_batch_size_nor_ranges_change_the_loss(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit
) -> None:
    windows = Windows(len(split), 20, 8)
    whole = scored(hf_model[1], split, windows)
    every = range(len(windows))
    for batch_size, size in ((1, 1), (16, 3), (1000, 7)):
        parts = [
            scored(hf_model[1], split, windows, batch_size, numbers=every[first : first + size])
            for first in range(0, len(windows), size)
        ]
        joined = DocumentSums.joined(parts)
        np.testing.assert_array_equal(joined.tokens, whole.tokens)
        np.testing.assert_allclose(joined.nats, whole.nats, rtol=1e-6)


def test_a_target_counts_for_the_document_that_it_stands_in(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit
) -> None:
    sums = scored(hf_model[1], split, Windows(len(split), 20, 20))
    # Each has its end of text; the first token of all is no target; the last document is cut.
    assert sums.tokens.tolist() == [40, 4, 91, 2, 18, 65, 31, 3]
    losses = plain_losses(hf_model[0], split.slice(0, len(split)).tolist(), 20, 20)
    assert sums.nats[1] == pytest.approx(sum(losses[40:44]), rel=1e-5)


def test_standard_error_agrees_with_leaving_each_document_out() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 60, 200)
    nats = tokens * rng.normal(3.0, 0.2, 200)
    sums = DocumentSums(np.arange(200), nats, tokens)
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    jackknife = math.sqrt(199 / 200 * ((without - without.mean()) ** 2).sum())
    assert sums.standard_error == pytest.approx(jackknife, rel=0.02)
    alone = DocumentSums(np.arange(1), nats[:1], tokens[:1])
    assert alone.standard_error is None


@pytest.mark.parametrize(
    ("tokens", "block", "stride"), [(2, 8, 8), (9, 8, 8), (10, 8, 3), (100, 8, 1), (97, 8, 8)]
)
def test_windows_count_every_token_but_the_first_once(tokens: int, block: int, stride: int) -> None:
    windows = Windows(tokens, block, stride)
    counted = [position for n in range(len(windows)) for position in windows.counted(n)]
    assert counted == list(range(1, tokens))
    for number in range(len(windows)):
        start, stop = windows.span(number)
        assert len(windows.counted(number)) > 0
        assert start < windows.counted(number).start and stop - start <= block + 1
        assert number == 0 or windows.counted(number).start - start >= block - stride + 1


def test_a_sample_of_windows_is_spread_over_the_split() -> None:
    windows = Windows(100_001, 10, 10)
    numbers = windows.sample(1000)
    assert len(numbers) == len(set(numbers)) == 100
    gaps = np.diff([*numbers, len(windows)])
    assert numbers[0] == 0 and gaps.min() >= 99 and gaps.max() <= 101
    assert windows.sample(200_000) == list(range(len(windows)))


@pytest.mark.parametrize("ends_turns", [False, True])
def test_the_error_says_what_it_is_taken_over(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit, ends_turns: bool
) -> None:
    split.ends_turns = ends_turns
    windows = Windows(len(split), 20, 20)
    sums = scored(hf_model[1], split, windows)
    result = split_result(sums, split, windows, range(len(windows)))
    unit = "turns of chats" if ends_turns else "documents"
    assert result["how"].endswith(f"standard error over {result['documents']} {unit}")


@pytest.mark.parametrize("part", [1, 3])
def test_lost_bytes_are_charged_and_leave_the_error_as_it_is(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit, tmp_path: Path, part: int
) -> None:
    ids = split.slice(0, len(split)).tolist()
    lossy = split_of(tmp_path / "lossy", ids, lost_bytes=200)
    windows = Windows(len(split), 20, 20)
    numbers = range(0, len(windows), part)
    sums = scored(hf_model[1], split, windows, numbers=numbers)
    before = split_result(sums, split, windows, numbers)
    after = split_result(sums, lossy, windows, numbers)
    share = 1.0 if part == 1 else after["tokens"] / (len(split) - 1)
    assert after["lost_bytes"] == round(200 * share) and before["lost_bytes"] == 0
    charge = 8 * math.log(2) * after["lost_bytes"] / after["tokens"]
    assert after["loss"] - before["loss"] == pytest.approx(charge)
    assert after["bpb"] - before["bpb"] == pytest.approx(8 * 0.2, rel=0.02)
    assert after["stderr"] == before["stderr"]
    mean = "" if part == 1 else ", by the split's mean"
    assert after["how"] == (
        f"{before['how']}; each byte that the tokenizer loses counts 8 bits, "
        f"{100 * after['lost_bytes'] / after['bytes']:.1f}% of the text{mean}"
    )


def test_a_cpu_scores_in_fp32_unless_told(
    hf_model: tuple[GPT2LMHeadModel, GPT], split: TokenSplit
) -> None:
    """And in bf16 the loss is the same to its three digits."""
    cpu, model = torch.device("cpu"), hf_model[1]
    assert scoring_dtype("auto", cpu) == scoring_dtype("fp32", cpu) == torch.float32
    assert scoring_dtype("bf16", cpu) == torch.bfloat16
    windows = Windows(len(split), 20, stride=20)
    exact = scored(model, split, windows).nats.sum()
    model.compute_dtype = torch.bfloat16
    try:
        rough = scored(model, split, windows).nats.sum()
    finally:
        model.compute_dtype = torch.float32
    assert rough != exact and rough == pytest.approx(exact, rel=5e-3)


@torch.no_grad()
def test_what_documents_begin_with_is_read_but_not_scored(
    hf_model: tuple[GPT2LMHeadModel, GPT], tmp_path: Path
) -> None:
    theirs, ours = hf_model
    bos = 300
    documents = [[bos, 5, 6, 7, EOS], [bos, 8, EOS], [bos, 9, 10, 11, 12, EOS]]
    tokens = [token for document in documents for token in document]
    ids = torch.tensor([tokens])
    losses = theirs(ids, labels=torch.where(ids == bos, -100, ids)).loss
    split = split_of(tmp_path / "split", tokens, document_prefix=[bos])
    windows = Windows(len(split), 20, 20)
    result = split_result(scored(ours, split, windows), split, windows, range(1))
    assert result["tokens"] == len(tokens) - 3
    assert result["loss"] == pytest.approx(float(losses), abs=1e-5)
    assert "without those that begin a document" in result["how"]
    workers = Workers(rank=0, size=1)
    score = score_split(ours, split, block_size=20, batch_size=4, workers=workers)
    assert score.tokens == result["tokens"] and score.num_bytes == split.bytes
    assert score.loss == pytest.approx(result["loss"], rel=1e-6)
