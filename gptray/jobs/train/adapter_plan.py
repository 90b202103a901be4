"""The adapter that a run is to train: whether its base has it, and how much it is. No torch."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config, UserError
from gptray.model.adapter import ADAPTER, Base, adapted_parts, trained_count
from gptray.model.adapter_folder import open_adapter


def check_base(config: Config, checkpoint: Path | None) -> None:
    """Refuse targets that the base does not have, and a base that is not the checkpoint's; without
    an adapter, weights in few bits.

    Raises UserError.
    """
    if config.lora.rank is None:
        if (kind := config.quantize.weights) != "none":
            raise UserError(
                f"quantize.weights={kind}: only frozen weights can be quantized in training; set "
                "lora.rank to train an adapter beside them, or leave quantize.weights out"
            )
        return
    base = _base(config, weights=checkpoint is not None)
    adapted_parts(base, config.lora.targets)
    if checkpoint:
        open_adapter(checkpoint / ADAPTER, base)


def trained_parameters(config: Config) -> int | None:
    """How many parameters an adapter trains; None where all are trained."""
    if config.lora.rank is None:
        return None
    return trained_count(_base(config, weights=False), config.lora)


def trained_facts(config: Config) -> dict[str, int]:
    """What the JSON line has of an adapter: how many parameters are trained."""
    count = trained_parameters(config)
    return {} if count is None else {"trained_parameters": count}


def _base(config: Config, *, weights: bool) -> Base:
    assert config.model.init_from
    return Base.of(config.model.init_from, weights=weights, quantized=config.quantize.weights)
