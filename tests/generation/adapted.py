"""A tiny base in a folder, and adapters of it with numbers that change every text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gptray.config import LoraConfig
from gptray.data.tokenizer import Tokenizer
from gptray.model.adapter import Base
from gptray.model.adapter_files import adapted_network, save_adapter
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained


def save_base(model: GPT, folder: Path, tokenizer: Tokenizer) -> Base:
    """Write a model folder."""
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return Base.of(str(folder))


def write_adapter(
    base: Base,
    folder: Path,
    *,
    rank: int = 2,
    seed: int = 0,
    targets: list[str] | None = None,
    train: Sequence[str] = (),
) -> Path:
    """An adapter with random numbers in PEFT's form."""
    lora = LoraConfig.model_validate({"rank": rank, "targets": targets, "train": list(train)})
    network = adapted_network(
        base, lora, base.config, vocab_size=base.config.rows, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    save_adapter(network, folder, base, lora)
    return folder
