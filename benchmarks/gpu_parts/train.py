"""A training step of GPT-2 124M with block size 1024 in bf16, in turns with peers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_parts.bench import Bench
from gpu_parts.peers import NanoGPT, Shape, Step, TransformersGPT2, peer_step
from made_tokens import random_tokens
from torch import nn

from gptray.config import Config, load_config, override
from gptray.data.tokens import TokenData
from gptray.training.loop import train_step
from gptray.training.mfu import peak_flops
from gptray.training.run import start
from gptray.training.workers import Workers

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "gpt2_124m.yaml"
VOCAB_SIZE, PADDED = 50257, 50304


@dataclass
class System:
    """A training step with its own PyTorch settings, and its measurements."""

    name: str
    step: Step
    rows: int
    block_size: int
    deterministic: bool
    first_s: float = 0.0
    peak_gib: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def turn(self, bench: Bench, steps: int) -> float:
        """Mean seconds of a step."""
        torch.use_deterministic_algorithms(self.deterministic)
        bench.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        bench.wait()
        return (time.perf_counter() - begin) / steps


# (function that builds a step, sequences per step, their length).
Build = tuple[Callable[[], Step], int, int]
Peer = Callable[[Shape, int], nn.Module]


def train(bench: Bench) -> None:
    few = 2 if bench.tiny else 12
    eager = {
        f"nanoGPT's loop, eager, B={few}": peer(bench, NanoGPT, PADDED, few),
        f"transformers, eager, B={few}": peer(bench, TransformersGPT2, VOCAB_SIZE, few),
        f"gptray, eager, B={few}": ours(bench, few, compile=False),
        f"gptray, eager, deterministic, B={few}": ours(
            bench, few, compile=False, deterministic=True
        ),
    }
    contest(bench, eager)
    train_compiled(bench, few)
    contest(bench, {"gptray, configs/gpt2_124m.yaml": recipe(bench)})


def train_compiled(bench: Bench, rows: int = 32) -> None:
    if bench.tiny:  # a CPU takes half a minute to compile
        return
    torch.compiler.reset()  # or it would compile with a dynamic number of rows
    contest(bench, {
        f"nanoGPT's loop, compiled, B={rows}": peer(bench, NanoGPT, PADDED, rows, compiled=True),
        f"gptray, compiled, B={rows}": ours(bench, rows, compile=True),
    })  # fmt: skip
    torch.compiler.reset()


def shape_of(bench: Bench) -> Shape:
    return (2, 2, 64, 64) if bench.tiny else (12, 12, 768, 1024)


def ours(bench: Bench, rows: int, **keys: Any) -> Build:
    shape = shape_of(bench)
    return lambda: gptray_step(bench, shaped(bench, shape, rows, **keys)), rows, shape[-1]


def peer(bench: Bench, kind: Peer, vocab_size: int, rows: int, *, compiled: bool = False) -> Build:
    shape = shape_of(bench)

    def build() -> Step:
        model = kind(shape, vocab_size)
        return peer_step(model, rows, shape[-1], bench.device, compiled=compiled)

    return build, rows, shape[-1]


def shaped(bench: Bench, shape: Shape, rows: int, **keys: Any) -> Config:
    n_layer, n_head, n_embd, block_size = shape
    return Config.model_validate(
        {
            "model": {
                "n_layer": n_layer,
                "n_head": n_head,
                "n_embd": n_embd,
                "n_positions": block_size,
                "vocab_size": PADDED,
            },
            "train": {
                "global_batch_size": rows,
                "block_size": block_size,
                "precision": "bf16",
                "max_steps": 10**9,
                **keys,
            },
            "compute": {"use_gpu": bench.on_gpu},
        }
    )


def recipe(bench: Bench) -> Build:
    """The config that users get, with at most four micro-batches per step."""
    config = load_config(str(RECIPE), [f"compute.use_gpu={str(bench.on_gpu).lower()}"])
    if bench.tiny:
        small = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64}
        keys = {f"model.{key}": value for key, value in small.items()}
        keys |= {"train.block_size": 64, "train.micro_batch_size": 1, "train.compile": False}
        config = override(config, {**keys, "train.global_batch_size": 2})
    else:
        rows = min(4 * config.micro_batch_size, config.train.global_batch_size)
        config = override(config, {"train.global_batch_size": rows})
    rows, block_size = config.train.global_batch_size, config.train.block_size
    return lambda: gptray_step(bench, config), rows, block_size


def gptray_step(bench: Bench, config: Config) -> Step:
    """gptray's own training step, including batches and dropout seeds."""
    tokens = bench.scratch / "tokens"
    data = TokenData.open(tokens) if tokens.exists() else random_tokens(tokens, VOCAB_SIZE)
    folder = Path(tempfile.mkdtemp(dir=bench.scratch))
    run = start(config, data, folder, workers=Workers.current(), device=bench.device)

    def step() -> None:
        train_step(run)

    return step


def contest(bench: Bench, builds: dict[str, Build]) -> None:
    """Build the systems, let them take turns, and report their speeds."""
    systems = []
    for name, build in builds.items():
        try:
            systems.append(built(bench, name, build))
        except Exception as error:
            bench.fail(f"train: {name}", error)
    for turn in range(2 if bench.tiny else 6):
        for system in systems:
            seconds = system.turn(bench, 1 if bench.tiny else 4)
            if turn:
                system.seconds.append(seconds)
    for system in systems:
        tell(bench, system)
    tell_ratios(bench, systems)
    torch.use_deterministic_algorithms(False)
    systems.clear()
    bench.free()


def built(bench: Bench, name: str, build: Build) -> System:
    """Build a system and make its first step, which compiles it."""
    make, rows, block_size = build
    bench.free()
    before = 0
    if bench.on_gpu:
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
    torch.use_deterministic_algorithms(False)
    step = make()
    system = System(
        name, step, rows, block_size, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    system.first_s = system.turn(bench, 1)
    if bench.on_gpu:
        peak = torch.cuda.max_memory_allocated(bench.device)
        system.peak_gib = (peak - before) / 2**30
    return system


def tell(bench: Bench, system: System) -> None:
    seconds = statistics.median(system.seconds)
    rate = system.rows * system.block_size / seconds
    used = mfu(bench, rate)
    figures = {
        "ms": round(seconds * 1e3, 2),
        "tokens_per_s": round(rate),
        "mfu": used and round(used, 4),
        "first_step_s": round(system.first_s, 2),
        "peak_gib": round(system.peak_gib, 2),
    }
    bench.keep(f"train: {system.name}", figures)
    share = f"MFU {used:6.1%}  " if used else ""
    bench.say(f"train: {system.name:42}{seconds * 1e3:8.1f} ms{rate:10,.0f} tok/s  {share}"
              f"first step {system.first_s:5.1f} s  {system.peak_gib:5.1f} GiB")  # fmt: skip


def tell_ratios(bench: Bench, systems: list[System]) -> None:
    """Report how many times as fast as nanoGPT's loop gptray is: the median over turns."""
    for ours in systems:
        for theirs in systems:
            if ours.name.startswith("gptray") and theirs.name.startswith("nanoGPT"):
                pairs = zip(ours.seconds, theirs.seconds, strict=True)
                ratio = round(statistics.median(t / o for o, t in pairs), 3)
                bench.keep(f"train: ratio of {ours.name} to nanoGPT's loop", ratio)
                bench.say(f"train: {ours.name} / nanoGPT's loop: {ratio:.2f} x")


def mfu(bench: Bench, rate: float) -> float | None:
    """The share of the GPU's bf16 peak that GPT-2 124M uses at `rate` tokens per second.

    Per token, 6 FLOPs for each weight of a product and 12 x layers x width x block for attention.
    """
    peak = peak_flops(torch.cuda.get_device_name(bench.device)) if bench.on_gpu else None
    if peak is None or bench.tiny:
        return None
    flops = 6 * (12 * 12 * 768**2 + VOCAB_SIZE * 768) + 12 * 12 * 768 * 1024
    return rate * flops / peak
