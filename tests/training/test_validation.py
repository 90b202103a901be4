"""Loss over a whole split: every token once, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.data.tokens import TokenData
from gptray.model.gpt import GPT
from gptray.training.validation import score_split
from gptray.training.workers import Workers


@pytest.fixture
def model(tiny_data: TokenData) -> GPT:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=32, dropout=0.5)
    model = GPT(config, vocab_size=tiny_data.vocab_size)
    model.initialise(1)
    return model


def test_score_equals_a_plain_loop_over_windows(model: GPT, tiny_data: TokenData) -> None:
    tokens = torch.from_numpy(tiny_data.val.slice(0, len(tiny_data.val)))
    nats, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            window = tokens[start : start + 33]
            logits = model(window[None, :-1])
            nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            count += len(window) - 1
    score = score_split(model, tiny_data.val, block_size=32, batch_size=7, workers=Workers(0, 1))
    assert count == score.tokens == len(tiny_data.val) - 1
    assert score.loss == pytest.approx(nats / count, abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(nats / (math.log(2) * tiny_data.val.bytes))


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_batch_size_does_not_change_the_score(
    model: GPT, tiny_data: TokenData, batch_size: int
) -> None:
    one = score_split(model, tiny_data.val, block_size=32, batch_size=1, workers=Workers(0, 1))
    other = score_split(
        model, tiny_data.val, block_size=32, batch_size=batch_size, workers=Workers(0, 1)
    )
    assert other.loss == pytest.approx(one.loss, abs=1e-6)
    assert other.tokens == one.tokens


def test_scoring_leaves_the_mode_of_the_model(model: GPT, tiny_data: TokenData) -> None:
    for training in (True, False):
        model.train(training)
        score_split(model, tiny_data.val, block_size=32, batch_size=8, workers=Workers(0, 1))
        assert model.training is training
