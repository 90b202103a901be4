"""The "pack-quantized" format of compressed-tensors: integers packed into 32-bit words, and scales.

Only the format's description; no torch here.

https://huggingface.co/docs/transformers/quantization/compressed_tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptray.config import UserError
from gptray.storage.stored import is_whole, read_foreign

# Suffixes of a weight's name.
VALUES, SCALES, SHAPE = "_packed", "_scale", "_shape"
# The key in config.json, and its values.
KEY = "quantization_config"
METHOD, FORMAT = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True)
class Packing:
    """bits: 4 or 8 per number. group: inputs that share a scale; None: a whole row."""

    bits: int
    group: int | None

    def words(self, inputs: int) -> int:
        """The words of a row."""
        return -(-inputs * self.bits // 32)

    def groups(self, inputs: int) -> int:
        """The scales of a row."""
        return 1 if self.group is None else -(-inputs // self.group)

    def inputs(self, words: int, groups: int) -> int:
        """How many inputs a row has, given its words and scales, if they are a multiple of 32."""
        return words * 32 // self.bits if self.group is None else groups * self.group


# Inputs that share a scale in 4-bit weights.
GROUP = 32
# The kinds of `gptray.model.quantized`; compressed-tensors has no iq4_nl.
PACKINGS = {"int8": Packing(8, None), "int4": Packing(4, GROUP), "iq4_nl": Packing(4, GROUP)}


def packed_config(packing: Packing, *, others: Sequence[str]) -> dict[str, object]:
    """The quantization_config for weights in this packing; embedding and head are not packed, nor
    are the layers `others`."""
    weights = {
        "num_bits": packing.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if packing.group is None else "group",
        "group_size": packing.group,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *others],
    }


def packing_of(config: Path) -> Packing | None:
    """The packing of the weights next to a config.json; None if they are not packed.

    Raises UserError for unsupported quantization.
    """
    raw = read_foreign(config).get(KEY)
    if raw is None:
        return None
    match raw:
        case {"quant_method": str(method)} if method != METHOD:
            raise _not_read(config, f"quant_method={method!r:.60}")
        case {"format": str(form)} if form != FORMAT:
            raise _not_read(config, f"format={form!r:.60}")
        case {"format": str(), "config_groups": {**groups}} if len(groups) == 1:
            (group,) = groups.values()
            return _packing(config, group)
    raise _not_read(config, "it does not have exactly one group of layers")


def _packing(config: Path, group: object) -> Packing:
    if isinstance(group, Mapping) and group.get("input_activations"):
        raise _not_read(config, "it quantizes activations too")
    match group:
        case {
            "weights": {
                "num_bits": (4 | 8) as bits,
                "type": "int",
                "symmetric": True,
                "strategy": str(strategy),
                **rest,
            }
        } if not rest.get("actorder"):
            size = rest.get("group_size")
            if strategy == "channel":
                return Packing(bits, None)
            if strategy == "group" and is_whole(size, least=1):
                return Packing(bits, size)
    raise _not_read(config, "its weights are not symmetric 4 or 8 bits by row or by group")


def _not_read(config: Path, what: str) -> UserError:
    return UserError(
        f"{config}: {KEY}: {what}; the only quantized weights supported are {METHOD}' {FORMAT} "
        "and GGUF files"
    )
