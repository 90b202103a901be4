"""An engine from a model folder, as a config says."""

from __future__ import annotations

from pathlib import Path

import torch

from gptray.config import Config, UserError
from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.model.gpt import GPT
from gptray.model.gpu_faults import check_gpu
from gptray.model.hf import load_pretrained
from gptray.model.memory import keep_freed_memory
from gptray.model.precision import pick_dtype
from gptray.native.backend import pick_backend


def open_engine(
    folder: str | Path, config: Config, *, max_batch_size: int | None = None
) -> tuple[Engine, Tokenizer]:
    """The engine of a model folder, by the config's generate and quantize sections; its tokenizer.

    max_batch_size: sequences at a time; None: generate.max_batch_size. On a GPU where
    compute.use_gpu says so.
    Raises UserError naming what is wrong with the folder, or why there is no such backend or GPU.
    """
    generate, device = config.generate, "cuda" if config.compute.use_gpu else "cpu"
    if config.compute.use_gpu:
        check_gpu()
    keep_freed_memory()
    model = load_pretrained(folder).eval().to(device)
    _check_weights(model, folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.valid_vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model's embedding "
            f"only {model.valid_vocab_size:,} rows"
        )
    # Many models pad their embedding: those rows stand for no text.
    model.valid_vocab_size = tokenizer.vocab_size
    if generate.backend == "auto" and config.compute.use_gpu:
        picked = "graph"
    else:
        picked = pick_backend(generate.backend, use_gpu=config.compute.use_gpu)
    engine = Engine(
        model,
        tokenizer,
        max_batch_size=max_batch_size or generate.max_batch_size,
        dtype=pick_dtype(generate.precision, device, key="generate.precision"),
        quantize=config.quantize.weights,
        backend=picked,
    )
    return engine, tokenizer


def _check_weights(model: GPT, folder: str | Path) -> None:
    """Raise UserError for weights that are not numbers: every row would end in an error."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight.detach().sum())):
            raise UserError(
                f"{folder}: {name} is not finite: the weights are damaged, or training diverged"
            )
