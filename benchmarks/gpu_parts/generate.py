"""Decoding: gptray's engine against transformers' generate, and where a step's time goes."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import (
    N_POSITIONS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    RANK,
    SHAPES,
    TOP_K,
    hf_generate,
    hf_model,
    make_model,
    prompts,
    random_adapters,
)
from gpu_parts.bench import Bench
from gpu_parts.facts import copy_rate
from gpu_parts.profile import profiled_step

from gptray.config import Config, override
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.engine import Engine
from gptray.generation.loading import open_engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling

__all__ = [
    "PROMPT_TOKENS", "TOP_K", "adapters", "engine_of", "generate", "generate_more",
    "model_folder", "step_seconds",
]  # fmt: skip

# Tokens of a long prompt.
LONG_PROMPT = 960
# Generates for one batch.
Run = Callable[[], None]


def generate(bench: Bench) -> None:
    """With GPT-2 124M and SmolLM2's shape; of each full step one is profiled."""
    for of, shape in (("", ""), ("llama, ", llama(bench))):
        folder = model_folder(bench, shape)
        peer = hf_model(folder, "bf16").to(bench.device)
        for batch in batch_sizes(bench):
            engine = engine_of(bench, folder, batch, precision="bf16")
            contest(bench, engine, peer, batch, new_tokens(bench), of=of)
            decode_step(bench, engine, batch, of=of)
            del engine
            bench.free()
        del peer


def generate_more(bench: Bench) -> None:
    """The bound set by memory bandwidth, prompts and long contexts, whose attention takes time."""
    batches, bandwidth = batch_sizes(bench), copy_rate(bench)
    for batch in batches:
        floor = floor_seconds(bench, batch, new_tokens(bench), bandwidth)
        bench.keep(f"more: floor by bandwidth, B={batch}", {"ms_per_step": round(floor * 1e3, 4)})
        bench.say(f"more: floor by bandwidth  B={batch:<4}{batch / floor:12,.0f} tok/s"
                  f"{floor * 1e3:9.3f} ms a step")  # fmt: skip
    engine = engine_of(bench, model_folder(bench), batches[-1], precision="bf16")
    seconds = bench.seconds(gptray_run(engine, batches[-1], 1), warm=1)
    title = f"more: a token after each of {batches[-1]} prompts"
    bench.keep(title, {"ms": round(seconds * 1e3, 3)})
    bench.say(f"{title}: {seconds * 1e3:.2f} ms")
    folder = model_folder(bench, llama(bench))
    engine = engine_of(bench, folder, batches[1], precision="bf16")
    peer = hf_model(folder, "bf16").to(bench.device)
    contest(bench, engine, peer, batches[1], 1, of="llama, long prompts, ", length=LONG_PROMPT)
    # One sequence with a long context, whose keys many programs share.
    left = min(new_tokens(bench), N_POSITIONS - LONG_PROMPT)
    contest(bench, engine, peer, 1, left, of="llama, long context, ", length=LONG_PROMPT)


def adapters(bench: Bench) -> None:
    """Steps in which every row has one of many adapters, by CUDA graphs and by plain PyTorch."""
    folder = model_folder(bench)
    for backend in ("auto", "torch"):
        for batch in batch_sizes(bench):
            engine = engine_of(
                bench, folder, batch, precision="bf16", backend=backend, takes_adapters=True
            )
            packed = random_adapters(engine, str(folder))
            plain, adapted = (step_seconds(bench, engine, batch, one) for one in ([None], packed))
            title = (
                f"adapters: step with {len(packed)} of rank {RANK} by {engine.backend}, B={batch}"
            )
            bench.keep(title, {"ms": round(adapted * 1e3, 3), "ms_without": round(plain * 1e3, 3)})
            bench.say(f"{title:50} {adapted * 1e3:9.3f} ms, without adapters {plain * 1e3:9.3f} ms")
            del engine, packed
            bench.free()


def batch_sizes(bench: Bench) -> tuple[int, ...]:
    return (1, 8) if bench.tiny else (1, 32, 256)


def new_tokens(bench: Bench) -> int:
    return 4 if bench.tiny else NEW_TOKENS


def llama(bench: Bench) -> str:
    """SmolLM2's shape."""
    return "tiny-llama" if bench.tiny else "llama-135m"


def contest(
    bench: Bench,
    engine: Engine,
    peer: Any,
    batch: int,
    new_tokens: int,
    *,
    of: str = "",
    length: int = PROMPT_TOKENS,
) -> None:
    """Time both in turns: a warm-up round and three that count, including prefill."""
    runs = {
        "gptray": gptray_run(engine, batch, new_tokens, length),
        "transformers": transformers_run(bench, peer, batch, new_tokens, length),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(2 if bench.tiny else 4):
        for name, run in runs.items():
            seconds = bench.seconds(run, warm=0, times=1)
            if turn:
                taken[name].append(seconds)
    for name, times in taken.items():
        seconds = float(np.median(times))
        rate, step = batch * new_tokens / seconds, seconds / new_tokens
        figures = {"tokens_per_s": round(rate, 1), "ms_per_step": round(step * 1e3, 3)}
        bench.keep(f"gen: {of}{name} bf16, B={batch}", figures)
        bench.say(f"gen: {of + name + ' bf16':20} B={batch:<4}{rate:12,.0f} tok/s"
                  f"{step * 1e3:9.3f} ms a step, prompts included")  # fmt: skip
    ratios = [t / o for o, t in zip(taken["gptray"], taken["transformers"], strict=True)]
    ratio = round(float(np.median(ratios)), 2)
    bench.keep(f"gen: {of}gptray/transformers, B={batch}", ratio)
    bench.say(f"gen: {of}gptray/transformers  B={batch:<4}{ratio:12.2f} x")


def model_folder(bench: Bench, shape: str = "") -> Path:
    """A folder of a model with random weights, GPT-2 124M by default, made once."""
    shape = shape or ("tiny" if bench.tiny else "124m")
    folder = bench.scratch / shape
    if not folder.exists():
        make_model(shape, folder)
    return folder


def engine_of(
    bench: Bench,
    folder: Path,
    batch: int,
    *,
    precision: str,
    quantize: str = "none",
    backend: str = "auto",
    takes_adapters: bool = False,
) -> Engine:
    asked = {
        "generate.max_batch_size": batch,
        "generate.precision": precision,
        "generate.backend": backend if bench.on_gpu else "torch",
        "compute.use_gpu": bench.on_gpu,
        "quantize.weights": quantize,
    }
    engine, _ = open_engine(folder, override(Config(), asked), takes_adapters=takes_adapters)
    return engine


def gptray_run(engine: Engine, batch: int, new_tokens: int, length: int = PROMPT_TOKENS) -> Run:
    sampling = Sampling(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, top_k=TOP_K, ignore_eos=True
    )

    def run() -> None:
        done = engine.run([Sequence(ids, sampling) for ids in prompts(batch, 0, length)])
        assert all(len(generation.tokens) == new_tokens for generation in done)

    return run


def transformers_run(bench: Bench, model: Any, batch: int, new_tokens: int, length: int) -> Run:
    ids = torch.tensor(prompts(batch, 0, length), device=bench.device)

    def run() -> None:
        hf_generate(model, ids, new_tokens)

    return run


def floor_seconds(bench: Bench, batch: int, new_tokens: int, bandwidth: float) -> float:
    """The seconds to read the weights, and each sequence's keys and values, once in bf16."""
    shape = SHAPES["tiny" if bench.tiny else "124m"]
    n_layer, n_embd = int(shape["n_layer"]), int(shape["n_embd"])
    weights = 12 * n_layer * n_embd**2 + 50257 * n_embd
    cached = 2 * n_layer * n_embd * (PROMPT_TOKENS + new_tokens // 2)
    return 2 * (weights + batch * cached) / bandwidth


def decode_step(bench: Bench, engine: Engine, batch: int, *, of: str = "") -> None:
    """Time the steps of a full batch, and profile one."""
    seen: dict[str, Any] = {}
    seconds = step_seconds(
        bench, engine, batch, then=lambda: seen.update(profiled_step(bench, engine.step))
    )
    bench.keep(f"gen: {of}decode step, B={batch}", {"ms": round(seconds * 1e3, 3), **seen})
    words = ", ".join(f"{value} {what.replace('_', ' ')}" for what, value in seen.items())
    bench.say(f"gen: {of}decode step B={batch}: {seconds * 1e3:.2f} ms; of one profiled: {words}")


def step_seconds(
    bench: Bench,
    engine: Engine,
    batch: int,
    adapters: abc.Sequence[PackedAdapter | None] = (None,),
    *,
    then: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of a step with a full batch, which still runs when `then` is called.

    adapters: of the rows, in turn.
    """
    sampling = Sampling(max_new_tokens=400, top_k=TOP_K, ignore_eos=True)
    assert PROMPT_TOKENS + 400 < N_POSITIONS
    running = [
        engine.submit(Sequence(ids, sampling, adapter=adapters[row % len(adapters)]))
        for row, ids in enumerate(prompts(batch, 1))
    ]
    while engine.waiting:
        engine.step()
    steps = 20
    taken = bench.seconds(lambda: [engine.step() for _ in range(steps)], warm=1, times=1) / steps
    then()
    for generation in running:
        engine.cancel(generation)
    return taken
