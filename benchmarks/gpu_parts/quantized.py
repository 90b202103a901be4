"""Quantized weights against bf16: single matrix products, and steps of the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from gpu_parts.bench import Bench
from gpu_parts.generate import engine_of, model_folder, step_seconds
from torch import Tensor

from gptray.generation.product_timing import choose_kernels
from gptray.generation.products import product
from gptray.generation.recording import Graphs
from gptray.model.packed_weights import PACKINGS

KINDS = ("none", *PACKINGS)
# (outputs, inputs) of layers of models with 124 M and 7 B parameters.
SHAPES = [(768, 3072), (4096, 4096), (11008, 4096)]
# How many copies of the weights are used in turns, so that they do not fit in the GPU's cache.
COPIES = 48


def quantized(bench: Bench) -> None:
    batches = (8,) if bench.tiny else (1, 8, 32, 256)
    for batch in batches:
        kinds = KINDS[:: 2 if bench.tiny else 1]
        compare(bench, "decode step", batch, kinds, partial(engine_seconds, bench, batch))
    for shape in [(64, 96)] if bench.tiny else SHAPES:
        for batch in batches:
            name = f"product {shape[0]} x {shape[1]}"
            compare(bench, name, batch, KINDS, partial(product_seconds, bench, shape, batch))


def compare(
    bench: Bench, what: str, batch: int, kinds: Iterable[str], seconds: Callable[[str], float]
) -> None:
    """Report each kind's time, and how many times as fast as bf16 (the first) it is."""
    whole = 0.0
    for kind in kinds:
        taken = seconds(kind)
        whole = whole or taken
        name = f"quant: {what}, {'bf16' if kind == 'none' else kind}, B={batch}"
        bench.keep(name, {"ms": round(taken * 1e3, 4), "bf16/this": round(whole / taken, 2)})
        bench.say(f"{name:50} {taken * 1e3:9.4f} ms {whole / taken:7.2f} x")


def product_seconds(bench: Bench, shape: tuple[int, int], batch: int, kind: str) -> float:
    """Seconds of one product, among others with their own weights in one CUDA graph."""
    generator = torch.Generator(bench.device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device)

    dtype = torch.bfloat16
    one = product(numbers(*shape), None, dtype, quantized=kind)
    copies = [copy.deepcopy(one) if bench.on_gpu else one for _ in range(COPIES)]
    choose_kernels(copies, batch)
    x = numbers(batch, shape[1]).to(dtype)

    def all_of_them() -> Tensor:
        return torch.stack([one(x)[0, 0] for one in copies])

    with torch.no_grad():
        return bench.seconds(Graphs(bench.device).recorded(all_of_them)) / COPIES


def engine_seconds(bench: Bench, batch: int, kind: str) -> float:
    """Seconds of a step of GPT-2 124M with a full batch."""
    engine = engine_of(bench, model_folder(bench), batch, precision="bf16", quantize=kind)
    seconds = step_seconds(bench, engine, batch)
    del engine
    bench.free()
    return seconds
