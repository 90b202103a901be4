"""Tokens per second of gptray's training step beside a plain PyTorch loop over transformers' GPT-2.

All systems take turns in one process on the same shape and batch, so that a busy machine slows
them alike; ratios are medians over rounds. Each keeps its own process-wide PyTorch settings.

    python benchmarks/train.py [--shape a|b16|c] [--compile] [--systems hf-fp32,hf-bf16,bf16]

With --cpu-time it counts one thread's CPU seconds: on a machine that others use at the same time
that is the only steady measure, since threads that wait for each other lose whole time slices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.training.loop import train_step
from gptray.training.run import start
from gptray.training.workers import Workers

# What one system does in a step, in the order of its training.
Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int


SHAPES = {
    # nanoGPT's recipe for a CPU, and for characters on a GPU with a quarter of its batch
    "a": Shape(4, 4, 128, 64, 12, 65),
    "b16": Shape(6, 6, 384, 256, 16, 65),
    # GPT-2 124M, its vocabulary padded
    "c": Shape(12, 12, 768, 256, 4, 50304),
}
SYSTEMS = ("hf-fp32", "hf-bf16", "fp32", "bf16")


class RandomText:
    """Stands for `TokenData`: `tokens` random ids in memory."""

    def __init__(self, vocab_size: int, tokens: int = 1_000_000) -> None:
        self.ids = np.random.default_rng(0).integers(vocab_size, size=tokens)
        self.train, self.tokens, self.vocab_size, self.fingerprint = self, tokens, vocab_size, ""

    def slice(self, first: int, last: int) -> NDArray[np.int64]:
        return self.ids[first:last]


def gptray_step(shape: Shape, precision: str, *, compiled: bool, device: torch.device) -> Step:
    """gptray's own training step, batches and dropout seeds included."""
    config = Config.model_validate(
        {
            "model": {
                "n_layer": shape.n_layer,
                "n_head": shape.n_head,
                "n_embd": shape.n_embd,
                "n_positions": shape.block_size,
                "dropout": 0.0,
            },
            "train": {
                "global_batch_size": shape.batch_size,
                "block_size": shape.block_size,
                "precision": precision,
                "compile": compiled,
                "max_steps": 10**9,
            },
        }
    )
    data = cast(TokenData, RandomText(shape.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        run = start(config, data, Path(folder), workers=Workers.current(), device=device)

    def step() -> None:
        train_step(run)

    return step


def hf_step(shape: Shape, precision: str, *, device: torch.device) -> Step:
    """The step that people write around transformers: autocast, clipping, fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        n_positions=shape.block_size,
        vocab_size=shape.vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.from_numpy(RandomText(shape.vocab_size).ids).to(device)
    batch = ids[: shape.batch_size * shape.block_size].view(shape.batch_size, shape.block_size)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item(), norm.item()

    return step


class Contestant:
    """A system with its own process-wide PyTorch settings."""

    def __init__(self, name: str, shape: Shape, *, compiled: bool, device: torch.device) -> None:
        self.name = name
        precision = name.removeprefix("hf-")
        _settings("highest", deterministic=False)
        if name.startswith("hf-"):
            self.step = hf_step(shape, precision, device=device)
        else:
            self.step = gptray_step(shape, precision, compiled=compiled, device=device)
        self.settings = (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def seconds(self, steps: int, clock: Callable[[], float]) -> float:
        """Mean seconds of a step, the first one thrown away: it finds cold caches."""
        _settings(self.settings[0], deterministic=self.settings[1])
        self.step()
        before = clock()
        for _ in range(steps):
            self.step()
        return (clock() - before) / steps


def _settings(matmul: str, *, deterministic: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(deterministic)


def measure(
    shape_name: str,
    *,
    systems: tuple[str, ...] = SYSTEMS,
    compiled: bool = False,
    rounds: int = 7,
    steps: int = 3,
    device: str = "cpu",
    cpu_time: bool = False,
) -> dict[str, Any]:
    """Tokens per second (medians) of each system and the ratio of ours to each of HF's.

    A ratio is the median over rounds of that round's ratio. With `cpu_time`, of one thread's CPU
    seconds; the process stays at one thread.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    shape = SHAPES[shape_name]
    tokens = shape.batch_size * shape.block_size
    contestants = [
        Contestant(name, shape, compiled=compiled, device=torch.device(device)) for name in systems
    ]
    for contestant in contestants:
        contestant.seconds(1, clock)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.seconds(steps, clock))
    return {
        "shape": shape_name,
        "compile": compiled,
        "clock": "cpu" if cpu_time else "wall",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "tokens_per_sec": {
            name: round(tokens / statistics.median(times)) for name, times in seconds.items()
        },
        "ratios": {
            f"{ours}/{theirs}": round(
                statistics.median(
                    t / o for t, o in zip(seconds[theirs], seconds[ours], strict=True)
                ),
                3,
            )
            for ours in systems
            for theirs in systems
            if theirs.startswith("hf-") and not ours.startswith("hf-")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="b16")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="of " + " ".join(SYSTEMS))
    parser.add_argument("--compile", action="store_true", help="compile gptray's model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a system per round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU seconds")
    args = parser.parse_args()
    result = measure(
        args.shape,
        systems=tuple(args.systems.split(",")),
        compiled=args.compile,
        rounds=args.rounds,
        steps=args.steps,
        device=args.device,
        cpu_time=args.cpu_time,
    )
    print(f"{'system':24}{'tokens/s':>10}")
    for name, rate in result["tokens_per_sec"].items():
        print(f"{name if name.startswith('hf-') else 'gptray ' + name:24}{rate:>10,}")
    for pair, ratio in result["ratios"].items():
        print(f"{pair:24}{ratio:>9.2f}x")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
