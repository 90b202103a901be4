"""Describes what a model folder stores, without reading weights: its network and its tensors.

No torch here. `gptray.model.header` compares the weights with config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptray.config import ModelConfig, UserError
from gptray.model.families import FAMILIES
from gptray.model.family import Family
from gptray.model.hf_config import read_config
from gptray.model.packed_weights import GROUP, SCALES, SHAPE, VALUES, Packing, packing_of
from gptray.model.parameters import HEAD, IGNORED, stored_name, stored_parts
from gptray.model.shape import weight_files
from gptray.model.tensor_file import read_header


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a safetensors file; `shape` and `dtype` as stored.

    packing, scales: for a packed weight, its packing and the file of its scales; shape, dtype and
    key are then those of the unpacked weight.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    packing: Packing | None = None
    scales: Path | None = None


@dataclass(frozen=True)
class StoredModel:
    """A model folder. weights: by their names in its family. copy: a tied head, if stored too.

    model_type: the family's name in config.json.
    """

    model_type: str
    shape: ModelConfig
    weights: dict[str, StoredWeight]
    copy: StoredWeight | None

    @property
    def family(self) -> Family:
        """The family, which says how the folder writes its network."""
        return FAMILIES[self.model_type]

    @property
    def embedding(self) -> StoredWeight:
        """The token embedding."""
        return self.weights[f"{self.family.prefix}{self.family.modules['wte'][0]}.weight"]

    @property
    def linear(self) -> dict[str, StoredWeight]:
        """The weights of the linear layers in its blocks."""
        rows = self.embedding.shape[0]
        parts = stored_parts(self.shape, self.family, rows)
        return {part.name: self.weights[part.name] for part in parts if part.is_linear}

    @property
    def packable(self) -> dict[str, StoredWeight]:
        """The linear weights whose rows are a multiple of GROUP."""
        return {name: one for name, one in self.linear.items() if one.shape[1] % GROUP == 0}


def stored_weights(folder: Path) -> list[StoredWeight]:
    """All tensors of a folder, each packed weight as one. Raises UserError for damaged files."""
    found = list[StoredWeight]()
    for path in weight_files(folder):
        tensors = read_header(path).tensors.items()
        found += [StoredWeight(path, key, tuple(dims), dtype) for key, (dims, dtype) in tensors]
    packing = packing_of(folder / "config.json")
    return found if packing is None else _joined(found, packing)


def _joined(found: list[StoredWeight], packing: Packing) -> list[StoredWeight]:
    """Join the values and scales of each packed weight. Raises UserError."""
    by_key = {one.key: one for one in found}
    for one in found:
        name = one.key.removesuffix(VALUES)
        if name == one.key or not name.endswith(".weight"):
            continue
        scales = by_key.pop(name + SCALES, None)
        if scales is None or len(one.shape) != 2 or len(scales.shape) != 2:
            raise UserError(f"{one.path}: {one.key} has no {name + SCALES} that fits")
        by_key.pop(name + SHAPE, None)
        inputs = packing.inputs(one.shape[1], scales.shape[1])
        expected = (one.shape[0], packing.groups(inputs)), packing.words(inputs)
        if (scales.shape, one.shape[1]) != expected:
            raise UserError(
                f"{one.path}: {one.key} has shape {list(one.shape)}, and {name + SCALES} "
                f"{list(scales.shape)}: they do not fit"
            )
        del by_key[one.key]
        shape = one.shape[0], inputs
        by_key[name] = StoredWeight(one.path, name, shape, "F32", packing, scales.path)
    return list(by_key.values())


def stored_model(folder: Path) -> StoredModel:
    """Describe a model folder. Raises UserError if it is damaged or not a known network."""
    model_type, shape = read_config(folder / "config.json")
    family, found = FAMILIES[model_type], dict[str, StoredWeight]()
    for stored in stored_weights(folder):
        if not stored.key.endswith(IGNORED):
            found[stored_name(stored.key, family)] = stored
    copy = found.pop(HEAD, None) if shape.tie_word_embeddings else None
    return StoredModel(model_type, shape, found, copy)
