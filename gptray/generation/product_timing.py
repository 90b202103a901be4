"""Times the kernels for products with quantized weights and uses the fastest on this GPU."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptray.generation.products import Product, WeightOnly
from gptray.generation.weight_only import GpuWeight, is_right, tiles_for
from gptray.native.measured import Measured, remembered
from gptray.wording import count

log = logging.getLogger("gptray")

# Timed calls of each kernel, in turns; the median counts.
ROUNDS = 15
# Bytes written twice before each call. They evict the weights from the GPU's cache, where a step
# would not find them either, and give the host time to get ahead of the GPU.
FLUSHED = 1 << 28
# The kernels' source files: a change to them makes a stored measurement void.
SOURCES = [Path(__file__).with_name(name) for name in ("triton_weights.py", "weight_only.py")]
# Expanding the weights first; the kernels that multiply by them directly are named by their tiles.
WHOLE = "whole"


@torch.no_grad()
def choose_kernels(products: Iterable[Product], rows: int) -> None:
    """Let products with quantized weights on a GPU use the fastest kernels for up to `rows` rows.

    A kernel is used only if its results match those with expanded weights. The first engine of a
    kind on a machine measures, and Triton compiles for a few seconds; later ones reuse the result.
    """
    shapes = dict[tuple[object, ...], list[WeightOnly]]()
    for one in products:
        if isinstance(one, WeightOnly) and isinstance(one.weight, GpuWeight):
            weight, dtype = one.weight, str(one.dtype)
            shape = (weight.kind, *weight.values.shape, weight.inputs, dtype, one.bias is None)
            shapes.setdefault(shape, []).append(one)
    best_s = expanded_s = 0.0
    for shape, alike in shapes.items():
        ways = _ways(alike[0], rows)
        if len(ways) == 1:
            continue
        seconds = _seconds(shape, rows, ways)
        best = next(name for name in sorted(seconds, key=seconds.__getitem__) if _works(ways, name))
        for one in alike:
            one.tile, one.rows = ways[best].tile, rows
        best_s += len(alike) * seconds[best]
        expanded_s += len(alike) * seconds[WHOLE]
    if best_s < expanded_s:
        log.info(
            "quantize.weights: multiplying by quantized weights directly, %.2fx as fast here as "
            "expanding them first (%.3g against %.3g ms for %s)",
            *(expanded_s / best_s, 1e3 * best_s, 1e3 * expanded_s, count(rows, "row")),
        )


def _ways(one: WeightOnly, rows: int) -> dict[str, WeightOnly]:
    """The product in every way that may be the fastest, by name, without its activation."""
    plain = replace(one, kind=None, tile=None)
    tiles = tiles_for(rows, one.dtype).items()
    return {WHOLE: plain} | {name: replace(plain, tile=tile, rows=rows) for name, tile in tiles}


def _seconds(
    shape: tuple[object, ...], rows: int, ways: Mapping[str, WeightOnly]
) -> Mapping[str, float]:
    """The time of each way that works, measured now or earlier on this machine."""
    plain = ways[WHOLE]
    asked = {
        "of": "products with quantized weights",
        "shape": shape,
        "rows": rows,
        "tiles": repr(tiles_for(rows, plain.dtype)),
        "device": torch.cuda.get_device_name(plain.weight.values.device),
        "version": torch.__version__,
        "kernels": hashlib.sha256(b"".join(one.read_bytes() for one in SOURCES)).hexdigest(),
    }
    return remembered(asked, ways.keys(), lambda _: _measure(rows, ways)).seconds


def _measure(rows: int, ways: Mapping[str, WeightOnly]) -> Measured:
    """Time the ways that work, taking turns."""
    trials = {name: way for name, way in ways.items() if _works(ways, name)}
    x = _numbers(ways[WHOLE], rows)
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=x.device)
    events = defaultdict[str, list[list[torch.cuda.Event]]](list)
    for _ in range(ROUNDS):
        for name, way in trials.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flushed.zero_()
            flushed.zero_()
            begin.record()
            way(x)
            end.record()
            events[name].append([begin, end])
    torch.cuda.synchronize(x.device)
    milliseconds = {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs)
        for name, pairs in events.items()
    }
    return Measured({name: taken / 1e3 for name, taken in milliseconds.items()})


def _works(ways: Mapping[str, WeightOnly], name: str) -> bool:
    """Whether a way runs here and matches expanded weights up to rounding."""
    if name == WHOLE:
        return True
    way = ways[name]
    x = _numbers(way, way.rows)
    expected = ways[WHOLE](x).float()
    tolerance = (2 * torch.finfo(way.dtype).eps + 1e-4) * expected.abs().max()
    return is_right(way.weight.kind, lambda: way(x).float(), expected, tolerance)


def _numbers(one: WeightOnly, rows: int) -> Tensor:
    """Random inputs x (rows, in), the same each time."""
    device = one.weight.values.device
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, one.weight.inputs, generator=generator, device=device).to(one.dtype)
