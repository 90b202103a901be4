"""Builds a run's model: from a checkpoint, from other weights, or new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gptray.config import Config, UserError
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData
from gptray.data.vocabulary import differing_ids, kept_rows
from gptray.model.adapter import ADAPTER, Base
from gptray.model.adapter_files import adapted_network, load_adapter
from gptray.model.frozen_base import load_base, map_base
from gptray.model.gpt import GPT
from gptray.model.header import check_weights
from gptray.model.hf import Rows, load_weights
from gptray.model.precision import computes_bf16, pick_dtype
from gptray.model.shape import model_folder, read_shape
from gptray.model.usage import Usage
from gptray.training.device import device_name
from gptray.training.workers import Workers

log = logging.getLogger("gptray")


def build_model(
    config: Config,
    data: TokenData,
    checkpoint: Path | None,
    device: torch.device,
    *,
    native: bool = False,
    tell: Callable[[str], None] = log.warning,
) -> GPT:
    """The run's model on the CPU, in the dtype for `device`; from the checkpoint, if there is one.

    With `lora.rank`, it is model.init_from with an adapter, and only the adapter has gradients.
    native: compute with the project's own kernels, in bf16. tell: receives notices, such as that
    the embedding was resized.
    """
    if config.model.init_from and not checkpoint:
        folder = model_folder(config.model.init_from)
        check_weights(folder, read_shape(folder))
    dtype = pick_dtype(config.train.precision, device)
    if config.train.precision == "auto" and device.type == "cuda" and not computes_bf16(device):
        tell(f"training in fp32: {device_name(device)} does not support bf16")
    if base := base_of(config):
        # CPU workers share the frozen weights through mmap; on a GPU each needs its own copy.
        load = partial(map_base, tell=tell) if device.type == "cpu" else load_base
        model = adapted_network(
            base,
            config.lora,
            config.model,
            vocab_size=data.vocab_size,
            dtype=dtype,
            native=native,
            seed=config.seed,
            load=load,
        )
        if checkpoint:
            load_adapter(model, checkpoint / ADAPTER, base)
        return model
    is_new = not (checkpoint or config.model.init_from)
    model = GPT(config.model, vocab_size=data.vocab_size, seed=config.seed if is_new else None)
    if checkpoint:
        load_weights(model, checkpoint / "model")
    elif config.model.init_from and config.model.resize_vocab:
        _load_resized(model, config, data, config.model.init_from, tell)
    elif config.model.init_from:
        stored_rows = config.model.vocab_size or data.vocab_size
        load_weights(model, model_folder(config.model.init_from), stored_rows=stored_rows)
    model.compute_dtype = dtype
    if native:
        model.use_kernels()
    return model


def base_of(config: Config) -> Base | None:
    """The model that a run's adapter is for; None if it trains all weights. Raises UserError."""
    if config.lora.rank is None:
        return None
    assert config.model.init_from
    return Base.of(config.model.init_from, quantized=config.quantize.weights)


def agreed_base(config: Config, workers: Workers, device: torch.device) -> Base | None:
    """Like `base_of`. On CPUs, raises UserError on every worker if their weights differ.

    On GPUs there is no need to: the first worker broadcasts its weights.
    """
    base = workers.all_or_none(lambda: base_of(config))
    if base and workers.size > 1 and device.type == "cpu":
        digests = workers.gather(workers.all_or_none(lambda: base.sha256))
        if len(set(digests)) > 1:
            raise UserError(
                f"model.init_from={base.source}: workers read different weights there (sha256 "
                f"{', '.join(sorted(set(digests)))}); give all nodes the same model"
            )
    return base


def _load_resized(
    model: GPT, config: Config, data: TokenData, source: str, tell: Callable[[str], None]
) -> None:
    """Load weights, moving each embedding row to its token's id in the new tokenizer."""
    own = Tokenizer.load(source)
    kept = kept_rows(own, data.tokenizer)
    folder = model_folder(source)
    rows = read_shape(folder).rows
    kept = [row if row < rows else -1 for row in kept]
    load_weights(model, folder, rows=Rows(kept, min(rows, own.vocab_size), config.seed))
    if differing_ids(own, data.tokenizer):
        # Its token ids mean other tokens now.
        model.usage = Usage(model_type=model.usage.model_type)
    new, moved = kept.count(-1), sum(row not in (-1, number) for number, row in enumerate(kept))
    if new or moved:
        tell(
            f"resized the embedding to the tokenizer's {len(kept):,} tokens: {len(kept) - new:,} "
            f"rows are from {source}, {moved:,} of them from another id; {new:,} new ones start "
            "from the mean row"
        )
