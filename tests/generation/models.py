"""Small GPTs with random weights, sharp enough to have opinions, and the slow obvious sampler."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptray.config import ModelConfig
from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.generation.decoder import Network
from gptray.generation.decoders import make_decoder
from gptray.generation.engine import Engine
from gptray.generation.sampling import draw
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.generation.utf8 import Mask
from gptray.model.gpt import GPT
from gptray.native.backend import why_not_native

needs_native = pytest.mark.skipif(
    why_not_native(use_gpu=False, look_at_cache=True) is not None,
    reason="needs a processor that runs the native code, and a C++ compiler",
)
BACKENDS = ["torch", "graph", pytest.param("native", marks=needs_native)]


def prompt_of(tokenizer: Tokenizer, length: int, seed: int) -> list[int]:
    """Tokens drawn at random, the same for a seed."""
    rng = random.Random(seed)
    return [rng.randrange(1, tokenizer.vocab_size) for _ in range(length)]


def network(
    backend: str, model: GPT, slots: int, dtype: torch.dtype, quantize: str = "none"
) -> Network:
    """The decoder of that backend, which takes adapters."""
    return make_decoder(backend, model, slots, dtype, quantize, takes_adapters=True)


def random_gpt(tokenizer: Tokenizer, *, seed: int = 0, **shape: Any) -> GPT:
    """A GPT whose logits are spread out, so that greedy and sampled texts are no accident."""
    defaults: dict[str, object] = {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "initializer_range": 0.4,
    }  # fmt: skip
    model = GPT(ModelConfig(**(defaults | shape)), vocab_size=tokenizer.vocab_size)
    model.initialise(seed)
    return model.eval()


def small_tokenizer() -> Tokenizer:
    return train_bpe(["the cat sees a dog. " * 5, "\uc61b\ub0a0 \uc61b\uc801\uc5d0 " * 5], 300)


def run(engine: Engine, asked: Iterable[Sequence]) -> list[Sequence]:
    """New sequences of the same prompts and settings, run to their ends."""
    return engine.run([replace(sequence) for sequence in asked])


def drawing(
    sampling: Sampling,
    prompt_tokens: int,
    history: list[int],
    eos_id: int,
    row: int = 0,
    mask: Mask | None = None,
) -> Sequence:
    """A sequence that is about to draw its next token."""
    sequence = Sequence(history[:prompt_tokens], sampling, row)
    sequence.history, sequence.ends, sequence.mask = history, [eos_id], mask
    return sequence


@torch.no_grad()
def reference(
    model: GPT, prompt: list[int], sampling: Sampling, eos_id: int, *, row: int = 0
) -> list[int]:
    """One row, no cache, the whole context anew for every token."""
    history = list(prompt)
    while len(history) - len(prompt) < sampling.max_new_tokens:
        if len(history) >= model.config.n_positions:
            break
        logits = model(torch.tensor([history]))[:, -1, : model.valid_vocab_size]
        drawn = draw(logits, [drawing(sampling, len(prompt), history, eos_id, row)])[0]
        assert drawn
        token = drawn.token
        if token == eos_id:
            break
        history.append(token)
    return history[len(prompt) :]
