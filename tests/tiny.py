"""A tiny text and a tiny run, for tests that train for real."""

from __future__ import annotations

import random
from pathlib import Path

from gptray.config import Config, load_config

SUBJECTS = ["the cat", "a dog", "the old king", "a small bird", "the river", "my brother"]
VERBS = ["sees", "likes", "follows", "remembers", "calls"]


def tiny_text(sentences: int = 1200, *, seed: int = 7) -> str:
    """Sentences of a small grammar: learnt in a few steps, and never quite the same."""
    rng = random.Random(seed)
    return "".join(
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(SUBJECTS)}.\n"
        for _ in range(sentences)
    )


def tiny_config(text_file: Path, storage: Path, *overrides: str) -> Config:
    """A run of some seconds: two layers, 32 wide, characters, no dropout."""
    defaults = [
        f"data.source={text_file}",
        f"storage_path={storage}",
        "data.tokenizer=char",
        "model.n_layer=2",
        "model.n_head=2",
        "model.n_embd=32",
        "model.n_positions=32",
        "model.dropout=0",
        "train.block_size=32",
        "train.global_batch_size=8",
        "train.max_steps=20",
        "train.eval_interval=10",
        "train.log_interval=1",
        "train.precision=fp32",
        "optim.lr=0.01",
        "optim.warmup_steps=2",
        "sample.max_new_tokens=8",
    ]
    values = dict(pair.split("=", 1) for pair in [*defaults, *overrides])
    return load_config(None, [f"{key}={value}" for key, value in values.items()])
