"""What a model folder stores, without the numbers: its network, and where each weight lies.

No torch here. `gptray.model.header` has compared the weights with config.json before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gptray.config import UserError
from gptray.model.families import FAMILIES, Family
from gptray.model.hf_config import NetworkShape, read_config
from gptray.model.parameters import HEAD, IGNORED, stored_name
from gptray.model.shape import weight_files


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a safetensors file; `shape` as it is stored."""

    path: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredModel:
    """A model folder. weights: by the names of its family; copy: of a tied head, if there is one.

    model_type: the family's name in config.json.
    """

    model_type: str
    shape: NetworkShape
    weights: dict[str, StoredWeight]
    copy: StoredWeight | None

    @property
    def family(self) -> Family:
        """How the folder writes its network."""
        return FAMILIES[self.model_type]

    @property
    def embedding(self) -> StoredWeight:
        """The rows of the vocabulary."""
        return self.weights[f"{self.family.prefix}{self.family.modules['wte'][0]}.weight"]


def stored_model(folder: Path) -> StoredModel:
    """What a model folder stores. Raises UserError for what is damaged or no known network."""
    model_type, shape = read_config(folder / "config.json")
    family, found = FAMILIES[model_type], dict[str, StoredWeight]()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    if not key.endswith(IGNORED):
                        dims = tuple(file.get_slice(key).get_shape())
                        found[stored_name(key, family)] = StoredWeight(path, key, dims)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete: {error}") from None
    copy = found.pop(HEAD, None) if shape["tie_word_embeddings"] else None
    return StoredModel(model_type, shape, found, copy)
