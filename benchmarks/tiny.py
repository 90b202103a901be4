"""A tiny model and a tiny text for benchmarks of behaviour rather than speed."""

from __future__ import annotations

import random
from pathlib import Path

NOUNS = ("the cat", "a dog", "the old king", "a small bird", "the river", "my brother")
VERBS = ("sees", "likes", "follows", "remembers", "calls")


def tiny_text(sentences: int) -> str:
    """Sentences of a small grammar, with a fixed seed."""
    rng = random.Random(7)
    return "".join(
        f"{rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(NOUNS)}.\n" for _ in range(sentences)
    )


def make_tiny_model(folder: Path, **shape: int) -> None:
    """Write a model folder: a BPE, and random weights large enough to give peaked predictions."""
    from gptray.config import ModelConfig
    from gptray.data.tokenizer import train_bpe
    from gptray.model.gpt import GPT
    from gptray.model.hf import save_pretrained

    tokenizer = train_bpe([tiny_text(100)], 300)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256} | shape
    model = GPT(ModelConfig(**shape, initializer_range=0.4), vocab_size=tokenizer.vocab_size)
    model.initialise(0)
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
