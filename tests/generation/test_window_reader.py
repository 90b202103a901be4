"""Whole windows, read by the network of an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.generation.window_reader import WindowReader
from tests.generation.models import BACKENDS, needs_native, random_gpt, run, small_tokenizer


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_weights_give_the_models_own_losses_and_greedy_tokens(backend: str) -> None:
    model = random_gpt(small_tokenizer(), n_positions=200).eval()
    idx, targets = torch.randint(model.valid_vocab_size, (2, 5, 150))
    reader = WindowReader(model, dtype=torch.float32, backend=backend)
    losses, likeliest = reader.read(idx, targets)
    torch.testing.assert_close(losses, model.token_losses(idx, targets), rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = model(idx)[..., : model.valid_vocab_size].argmax(-1)
    assert (likeliest == expected).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_quantized_weights_give_what_the_engine_says_of_a_prompt(backend: str, kind: str) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, n_positions=200)
    tokens = torch.randint(1, model.valid_vocab_size, (1, 180))
    options: dict[str, Any] = {"dtype": torch.float32, "quantize": kind, "backend": backend}
    losses = WindowReader(model, **options).token_losses(tokens[:, :-1], tokens[:, 1:])
    request = Sequence(tokens[0].tolist(), Sampling(max_new_tokens=0), prompt_logprobs=0)
    (read,) = run(Engine(model, tokenizer, **options), [request])
    expected = torch.tensor([-(one.logprob or 0.0) for one in read.scored[1:]])
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-5)
    full = WindowReader(model, dtype=torch.float32, backend=backend)
    assert not torch.equal(losses, full.token_losses(tokens[:, :-1], tokens[:, 1:]))
