"""The adapter that a run is to train: whether its base has it, and how much it is. No torch."""

from __future__ import annotations

import logging
from pathlib import Path

from gptray.config import Config
from gptray.model.adapter import ADAPTER, Base, adapted_parts, trained_count
from gptray.model.adapter_folder import open_adapter

log = logging.getLogger("gptray")


def check_base(config: Config, checkpoint: Path | None) -> None:
    """Refuse targets that the base has not, and another base than that of the run's checkpoint.

    Raises UserError.
    """
    if config.lora.rank is None:
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


def tell_trained(config: Config) -> dict[str, int]:
    """Say how much is trained, if that is an adapter; what the JSON line has of it."""
    count = trained_parameters(config)
    if count is None:
        return {}
    log.info("an adapter of rank %d: %s parameters are trained", config.lora.rank, f"{count:,}")
    return {"trained_parameters": count}


def _base(config: Config, *, weights: bool) -> Base:
    assert config.model.init_from
    return Base.of(config.model.init_from, weights=weights)
