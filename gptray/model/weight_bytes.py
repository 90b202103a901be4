"""Predicts the bytes of a network's linear layers by kind of weights; no torch here."""

from __future__ import annotations

from gptray.config import ModelConfig
from gptray.model.packed_weights import PACKINGS
from gptray.model.parameters import block_modules

# Bytes of a full weight (bf16) and of a scale (fp16).
_FULL, _SCALE = 2, 2


def linear_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes of the linear layers' weights in a network's blocks; the kind "none" is bf16."""
    linear = [module for module in block_modules(config) if len(module.inputs) == 1]
    return config.n_layer * sum(
        sum(module.parts) * _row_bytes(module.inputs[0], kind) for module in linear
    )


def _row_bytes(inputs: int, kind: str) -> int:
    if kind == "none":
        return _FULL * inputs
    packing = PACKINGS[kind]
    return -(-inputs * packing.bits // 8) + _SCALE * packing.groups(inputs)
