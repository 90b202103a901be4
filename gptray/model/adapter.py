"""Which weights of a model an adapter covers, and their names in PEFT's folders. No torch here.

An adapter adds a product of two narrow matrices to the weight of a linear layer (Hu et al. 2022,
LoRA). `gptray.model.adapter_folder` checks a folder, `gptray.model.adapter_files` reads and writes
the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gptray.config import LoraConfig, ModelConfig, UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.model.family import Family
from gptray.model.hf_config import family_in
from gptray.model.parameters import HEAD, Part, stored_parts
from gptray.model.shape import model_folder, read_shape, weights_sha256

# The adapter's folder in a run or a checkpoint.
ADAPTER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT writes before a module's name, and after it.
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Keys in the metadata of the weight file.
BASE_SHA256, BASE_QUANTIZED = "base_sha256", "base_quantized"
_NORMS = ("ln_1", "ln_2", "ln_1_out", "ln_2_out", "ln_f", "q_norm", "k_norm")
_HEAD = HEAD.removesuffix(".weight")
_EMBEDDINGS = ("wte", "wpe", _HEAD)


@dataclass(frozen=True)
class Base:
    """The model that an adapter adapts. source: its name; folder: its local folder.

    quantized: the kind to which its linear layers' weights are rounded while an adapter is trained:
    none, int8, int4 or iq4_nl.
    """

    source: str
    folder: Path
    quantized: str = "none"

    @classmethod
    def of(cls, source: str, *, weights: bool = True, quantized: str = "none") -> Base:
        """The model in a folder or on the hub; its weights are not fetched unless `weights`.

        Raises UserError.
        """
        return cls(source, model_folder(source, weights=weights), quantized)

    @cached_property
    def family(self) -> Family:
        """The family, which says how its files name and lay out weights."""
        return family_in(self.folder)

    @cached_property
    def config(self) -> ModelConfig:
        """Its network."""
        return read_shape(self.folder)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of its weights."""
        return weights_sha256(self.folder)

    @cached_property
    def parts(self) -> list[Part]:
        """All of its weights."""
        return list(stored_parts(self.config, self.family, self.config.rows))

    @property
    def linear(self) -> list[Part]:
        """The weights of the linear layers in its blocks."""
        return [part for part in self.parts if part.is_linear]


def adapted_name(model: str, adapter: str) -> str:
    """The name of a model with an adapter."""
    return f"{model}:{adapter}"


def module_of(part: Part) -> str:
    """The module that a weight or a bias belongs to, by its name in transformers."""
    return part.name.rpartition(".")[0]


def adapted_parts(base: Base, targets: Sequence[str] | None) -> list[Part]:
    """The weights that `lora.targets` selects. Raises UserError for a target that selects none."""
    if targets is None:
        return base.linear
    modules = [module_of(part) for part in base.linear]
    for target in targets:
        if not any(is_named(module, [target]) for module in modules):
            names = _last_names(base.linear)
            near = did_you_mean(nearest(target, names))
            raise UserError(
                f"lora.targets: {base.source} has no linear layer {target} in its blocks{near} "
                f"(layers: {' '.join(names)})"
            )
    return [part for part in base.linear if is_named(module_of(part), targets)]


def replaced_parts(base: Base, train: Collection[str]) -> list[Part]:
    """The weights that `lora.train` selects."""
    kinds = (*_NORMS * ("norms" in train), *_EMBEDDINGS * ("embeddings" in train))
    return [part for part in base.parts if part.parameter.split(".")[-2] in kinds]


def trained_count(base: Base, lora: LoraConfig) -> int:
    """The number of trained parameters. Raises UserError as `adapted_parts` does."""
    assert lora.rank
    narrow = sum(lora.rank * sum(part.dims) for part in adapted_parts(base, lora.targets))
    whole = sum(math.prod(part.dims) for part in replaced_parts(base, lora.train))
    return narrow + whole


def peft_config(base: Base, lora: LoraConfig) -> dict[str, object]:
    """The adapter_config.json for PEFT's LoraConfig."""
    replaced = _last_names(replaced_parts(base, lora.train))
    if needs_head_copy(base, lora):
        replaced.append(_HEAD)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": lora.targets or _last_names(base.linear),
        "modules_to_save": replaced or None,
        "fan_in_fan_out": base.family.transposed,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def needs_head_copy(base: Base, lora: LoraConfig) -> bool:
    """Whether the folder needs a copy of the embedding as head, lest PEFT untie a tied one."""
    return "embeddings" in lora.train and base.config.tie_word_embeddings


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module's name is one of these or ends with one, as in PEFT."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _last_names(parts: Iterable[Part]) -> list[str]:
    return sorted({module_of(part).rpartition(".")[2] for part in parts})
