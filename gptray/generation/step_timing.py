"""Which backend decodes a network faster here: a few steps of a smaller network of its widths."""

from __future__ import annotations

from functools import partial

import torch

from gptray.config import Config, ModelConfig
from gptray.generation.decoder import Decoder
from gptray.generation.native_decoder import NativeDecoder
from gptray.model.families import SHAPE
from gptray.model.gpt import GPT
from gptray.model.parameters import parameter_count
from gptray.model.precision import pick_dtype
from gptray.native.backend import GENERATE_KEY, why_not_native
from gptray.native.measured import Choice, Step, faster, pytorch_since
from gptray.wording import count

# Weights of the smaller network: more than a core's caches hold, and packed in a moment.
WEIGHTS = 25_000_000
# Its sequences have half of so many tokens.
POSITIONS = 256
TOP_K = 50


def faster_decoder(
    config: Config, shape: ModelConfig, *, max_batch_size: int, takes_adapters: bool = False
) -> Choice:
    """What `generate.backend` auto means on this process's cores, for a network of a shape.

    shape: its vocab_size is the rows of the embedding. max_batch_size: sequences of a step.
    takes_adapters: PyTorch calls several functions a layer for each adapter, and is not timed.
    """
    if missing := why_not_native(use_gpu=False, look_at_cache=True):
        return pytorch_since(GENERATE_KEY, missing)
    if takes_adapters:
        return Choice("native", f"{GENERATE_KEY}: native, the faster one with adapters")
    dtype = pick_dtype(config.generate.precision, "cpu", key="generate.precision")
    work = {
        "of": "decoding",
        "threads": torch.get_num_threads(),
        "shape": {name: getattr(shape, name) for name in ("vocab_size", *SHAPE)},
        "positions": min(shape.n_positions, POSITIONS),
        "sequences": max_batch_size,
        "weights": [str(dtype), config.quantize.weights],
    }

    def decoding_step(kind: type[NativeDecoder] | type[Decoder]) -> Step:
        """A token more for each sequence, candidates for the next one included."""
        part = part_of(shape)
        decoder = kind(part, max_batch_size, dtype=dtype, quantize=config.quantize.weights)
        decoding = [(0, part.config.n_positions // 2)] * max_batch_size
        return lambda: decoder.top(decoder.step(decoding, []), TOP_K)

    makers = {
        "native": partial(decoding_step, NativeDecoder),
        "torch": partial(decoding_step, Decoder),
    }
    what = f"part of a step of {count(max_batch_size, 'sequence')}"
    return faster(GENERATE_KEY, what, work, makers)


def part_of(shape: ModelConfig) -> GPT:
    """Some blocks of a network, and as much of its vocabulary: what a step does, in proportion.

    Its weights are no random numbers, which take longer to draw than the steps.
    """
    assert shape.vocab_size
    L = shape.n_layer
    outer = parameter_count(shape.model_copy(update={"n_layer": 0}), shape.vocab_size)
    block = (parameter_count(shape, shape.vocab_size) - outer) // L
    layers = max(1, min(L, WEIGHTS // block))
    change = {
        "n_layer": layers,
        "n_positions": min(shape.n_positions, POSITIONS),
        "vocab_size": None,
    }
    rows = -(-shape.vocab_size * layers // L)
    part = GPT(shape.model_copy(update=change), vocab_size=rows, initialised=False).eval()
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.linspace(-0.05, 0.05, weight.numel()).view_as(weight))
    return part
