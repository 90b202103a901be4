"""Tiny jobs, models and texts, for benchmarks of behaviour rather than speed."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# A network that trains in seconds.
NETWORK = [
    "model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.n_positions=64",
    "train.block_size=64", "train.global_batch_size=8",
]  # fmt: skip
TRAINED = [*NETWORK, "data.tokenizer=char", "sample.max_new_tokens=4"]
WORDS = ["ray", "train", "tune", "serve", "data", "actor", "task", "node", "driver", "worker"]
NOUNS = ("the cat", "a dog", "the old king", "a small bird", "the river", "my brother")
VERBS = ("sees", "likes", "follows", "remembers", "calls")


def job_command(job: str, *words: str) -> list[str]:
    """The command that runs a job with these arguments."""
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *words]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a job."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(driver: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for a job; return its last line, which is JSON. Raises SystemExit if it failed."""
    output, errors = driver.communicate()
    if driver.returncode:
        raise SystemExit(f"the job failed:\n{errors.decode()[-3000:]}")
    result: dict[str, Any] = json.loads(output.decode().splitlines()[-1])
    return result


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def write_words(path: Path, rng: random.Random) -> None:
    """Write sentences of random words, enough for some epochs."""
    lines = (f"{' '.join(rng.choices(WORDS, k=6))}.\n" for _ in range(3000))
    path.write_text("".join(lines), "utf-8")


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
