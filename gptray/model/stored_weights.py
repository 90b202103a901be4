"""Where the weights of a model folder lie, under the names that gptray gives them; no torch here.

`gptray.model.header` has compared them with config.json before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gptray.config import UserError
from gptray.model.shape import PREFIX, weight_files

HEAD, EMBEDDING = "lm_head.weight", PREFIX + "wte.weight"
# Causal-mask buffers of old files, no weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a safetensors file; `shape` as it is stored, linear layers (in, out)."""

    path: Path
    key: str
    shape: tuple[int, ...]


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """Every weight in a folder's files by its name; a copy of the tied head among them, if any.

    Raises UserError for a file that is damaged.
    """
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    if not key.endswith(_BUFFERS):
                        shape = tuple(file.get_slice(key).get_shape())
                        found[_name(key)] = StoredWeight(path, key, shape)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error}") from None
    return found


def _name(key: str) -> str:
    return key if key == HEAD or key.startswith(PREFIX) else PREFIX + key
