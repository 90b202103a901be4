"""Opens an engine for a model folder, with the backend that decodes faster on this machine."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from gptray.config import Config, ModelConfig, UserError
from gptray.data.tokenizer import Tokenizer
from gptray.data.vocabulary import needed_rows
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.decoder import Decoder, StepRows
from gptray.generation.engine import Engine
from gptray.generation.native_decoder import NativeDecoder
from gptray.model.adapter import Base
from gptray.model.adapter_files import load_adapted, load_low_rank
from gptray.model.adapter_folder import open_adapter
from gptray.model.families import SHAPE
from gptray.model.gpt import GPT
from gptray.model.gpu_faults import check_gpu, memory_told
from gptray.model.memory import keep_freed_memory
from gptray.model.parameters import parameter_count
from gptray.model.precision import pick_dtype
from gptray.model.shape import read_shape
from gptray.model.unread import unread_network
from gptray.native.backend import GENERATE_KEY, check_native, why_not_native
from gptray.native.core_sharing import share_cores
from gptray.native.measured import Choice, Step, faster, pytorch_since
from gptray.wording import count

# Backends are timed on a part of the network with about this many weights: more than a core's
# caches hold, yet packed in a moment.
WEIGHTS = 25_000_000
# The context of that part, half of which its sequences fill.
POSITIONS = 256
TOP_K = 50
log = logging.getLogger("gptray")


def open_engine(
    folder: str | Path,
    config: Config,
    *,
    max_batch_size: int | None = None,
    takes_adapters: bool = False,
) -> tuple[Engine, Tokenizer]:
    """An engine for a model folder, set up by the config's generate and quantize sections.

    Returns it with the folder's tokenizer. generate.adapter is merged into the model;
    compute.use_gpu puts it on a GPU. max_batch_size: serve's; None takes generate.max_batch_size.
    takes_adapters: sequences may have adapters from `pack_adapter`. Raises UserError naming what is
    wrong with the folder, or why the backend or a GPU is not available; RunFailed if a GPU's memory
    is too small.
    """
    generate, device = config.generate, "cuda" if config.compute.use_gpu else "cpu"
    if config.compute.use_gpu:
        check_gpu()
    else:
        share_cores()
    slots = max_batch_size or generate.max_batch_size
    tokenizer, shape = Tokenizer.load(folder), read_shape(folder)
    if needed_rows(tokenizer) > shape.rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model's "
            f"embedding has only {shape.rows:,} rows"
        )
    picked = decoder_backend(config, shape, max_batch_size=slots, takes_adapters=takes_adapters)
    name = "generate.max_batch_size" if max_batch_size is None else "serve.max_batch_size"
    with memory_told(name, slots):
        if device == "cpu" and generate.adapter is None:
            model = unread_network(folder)
        else:
            model = load_adapted(folder, generate.adapter).eval().to(device)
            _check_weights(model, folder)
        # Many models pad their embedding with rows that no token uses.
        model.valid_vocab_size = min(tokenizer.vocab_size, shape.rows)
        engine = Engine(
            model,
            tokenizer,
            max_batch_size=slots,
            dtype=pick_dtype(generate.precision, device, key="generate.precision"),
            quantize=config.quantize.weights,
            backend="graph" if picked == "auto" else picked,
            takes_adapters=takes_adapters,
        )
    keep_freed_memory()  # only now, so that what packing the weights freed went back to the system
    return engine, tokenizer


def pack_adapter(engine: Engine, base: Base, source: str | Path) -> PackedAdapter:
    """Pack the adapter in a folder for sequences of an engine of its base. Raises UserError."""
    return engine.pack(load_low_rank(base, open_adapter(source, base)))


def decoder_backend(
    config: Config, shape: ModelConfig, *, max_batch_size: int, takes_adapters: bool = False
) -> str:
    """The backend that `generate.backend` selects: native, torch, or on GPUs auto.

    An automatic choice is logged with its reason; see `faster_decoder`, also for the arguments.
    Raises UserError for native if it is not available.
    """
    use_gpu = config.compute.use_gpu
    if config.generate.backend != "auto":
        check_native(GENERATE_KEY, config.generate.backend, use_gpu=use_gpu, look_at_cache=True)
        return config.generate.backend
    if use_gpu:
        return "auto"
    choice = faster_decoder(
        config, shape, max_batch_size=max_batch_size, takes_adapters=takes_adapters
    )
    log.info("%s", choice.why)
    return choice.backend


def _check_weights(model: GPT, folder: str | Path) -> None:
    """Raise UserError for weights that are not finite: every row would end in an error."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight.detach().sum())):
            raise UserError(
                f"{folder}: {name} is not finite: the weights are damaged, or training diverged"
            )


def faster_decoder(
    config: Config, shape: ModelConfig, *, max_batch_size: int, takes_adapters: bool = False
) -> Choice:
    """The backend that `generate.backend=auto` selects on this process's cores.

    shape: the network's; its vocab_size is the rows of the embedding. max_batch_size: sequences in
    a step. takes_adapters: the native backend if there is one, untimed, because PyTorch calls
    several functions in each layer for every adapter.
    """
    if missing := why_not_native(use_gpu=False, look_at_cache=True):
        return pytorch_since(GENERATE_KEY, missing)
    if takes_adapters:
        return Choice("native", f"{GENERATE_KEY}: native, which is faster with adapters")
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
        """One step that decodes a token of every sequence, and ranks candidates for the next."""
        part = part_of(shape)
        decoder = kind(part, max_batch_size, dtype=dtype, quantize=config.quantize.weights)
        decoding = [(0, part.config.n_positions // 2)] * max_batch_size
        return lambda: decoder.top(decoder.step(StepRows(decoding, [])), TOP_K)

    makers = {
        "native": partial(decoding_step, NativeDecoder),
        "torch": partial(decoding_step, Decoder),
    }
    what = f"part of a step of {count(max_batch_size, 'sequence')}"
    return faster(GENERATE_KEY, what, work, makers)


def part_of(shape: ModelConfig) -> GPT:
    """Some of a network's blocks and the same share of its vocabulary, to time a step's work on.

    Its weights are evenly spaced: drawing random numbers would take longer than the steps.
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
    part = GPT(shape.model_copy(update=change), vocab_size=rows, seed=None).eval()
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.linspace(-0.05, 0.05, weight.numel()).view_as(weight))
    return part
