"""Adapters' weights in PEFT's folders: save, load, and merge into the model that they adapt.

What a folder must be is `gptray.model.adapter`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptray.config import LoraConfig, ModelConfig, UserError
from gptray.files import replacing
from gptray.model.adapter import (
    BASE_SHA256,
    CONFIG,
    PREFIX,
    WEIGHTS,
    A,
    B,
    Base,
    adapted_parts,
    module_of,
    peft_config,
    replaced_parts,
    writes_copy,
)
from gptray.model.adapter_folder import Adapter, open_adapter
from gptray.model.gpt import GPT
from gptray.model.hf import from_file, load_pretrained, to_file
from gptray.model.lora import LoRALinear, adapt
from gptray.model.parameters import HEAD, Part
from gptray.model.tensor_file import write_tensors


def adapt_to(model: GPT, base: Base, lora: LoraConfig, *, seed: int) -> None:
    """Freeze a network that has the base's weights, and give it a new adapter; see `adapt`."""
    adapted, replaced = adapted_parts(base, lora.targets), replaced_parts(base, lora.train)
    adapt(model, lora, adapted, replaced, seed=seed)


def save_adapter(model: GPT, folder: Path, base: Base, lora: LoraConfig) -> None:
    """Write the adapter of a network, and what else of it was trained, as PEFT's folder (fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = dict[str, Tensor]()
    for part in adapted_parts(base, lora.targets):
        a, b = _pair(model, part)
        tensors[PREFIX + module_of(part) + A] = a
        tensors[PREFIX + module_of(part) + B] = _rows(b, part, model.config, to_file)
    for part in replaced_parts(base, lora.train):
        weight = parameters[part.parameter].detach()[part.start : part.start + part.rows]
        tensors[PREFIX + part.name] = to_file(weight, part, model.config)
    if writes_copy(base, lora):
        tensors[PREFIX + HEAD] = model.head.detach()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = {"format": "pt", BASE_SHA256: base.sha256}
    with replacing(folder / WEIGHTS) as path:
        write_tensors(path, shapes, lambda name: tensors[name], metadata)
    with replacing(folder / CONFIG) as path:
        path.write_text(json.dumps(peft_config(base, lora), indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: GPT, folder: Path, base: Base) -> None:
    """Give a network's own adapter the weights that `save_adapter` wrote. Raises UserError."""
    adapter = open_adapter(folder, base)
    for part, a, b in _pairs(adapter, model.config):
        own_a, own_b = _pair(model, part)
        own_a.copy_(a)
        own_b.copy_(b)
    _replace(model, adapter)


@torch.no_grad()
def merge_adapter(model: GPT, adapter: Adapter) -> None:
    """Add an adapter to the weights of its base, in fp32. Raises UserError if it is damaged."""
    parameters = dict(model.named_parameters())
    for part, a, b in _pairs(adapter, model.config):
        weight = parameters[part.parameter][part.start : part.start + part.rows]
        weight.addmm_(b.float(), a.float(), alpha=adapter.lora.scale)
    _replace(model, adapter)


def load_merged(base: Base, adapter: Adapter, *, dropout: float | None = None) -> GPT:
    """The base with an adapter as an ordinary network, see `load_pretrained`. Raises UserError."""
    model = load_pretrained(base.folder, dropout=dropout)
    merge_adapter(model, adapter)
    return model


def load_adapted(source: str | Path, adapter: str | Path | None) -> GPT:
    """As `load_pretrained`, with the adapter in a folder, if there is one. Raises UserError."""
    if adapter is None:
        return load_pretrained(source)
    base = Base.of(str(source))
    return load_merged(base, open_adapter(adapter, base))


def _pair(model: GPT, part: Part) -> tuple[Tensor, Tensor]:
    """A and B of a layer that is adapted, of which `part` is a part."""
    layer = model.get_submodule(part.parameter.removesuffix(".weight"))
    assert isinstance(layer, LoRALinear)
    return next(
        (a.detach(), b.detach()) for span, a, b in layer.pairs() if span.start == part.start
    )


def _pairs(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """A (rank, inputs) and B (outputs, rank) of each layer, its outputs as the network has them."""
    with _opened(adapter) as file:
        for part in adapter.adapted:
            name = PREFIX + module_of(part)
            b = _rows(file.get_tensor(name + B), part, config, from_file)
            yield part, file.get_tensor(name + A), b


def _rows(
    b: Tensor, part: Part, config: ModelConfig, turn: Callable[[Tensor, Part, ModelConfig], Tensor]
) -> Tensor:
    """B with its outputs in the file's order, or in the network's: B is never transposed."""
    return turn(b, part, config) if part.turned == "by_head" else b


def _replace(model: GPT, adapter: Adapter) -> None:
    parameters = dict(model.named_parameters())
    with _opened(adapter) as file:
        for part in adapter.replaced:
            weight = parameters[part.parameter][part.start : part.start + part.rows]
            weight.copy_(from_file(file.get_tensor(PREFIX + part.name), part, model.config))
        has_copy = model.config.tie_word_embeddings and PREFIX + HEAD in file.keys()  # noqa: SIM118
        if has_copy and not torch.equal(file.get_tensor(PREFIX + HEAD).float(), model.head.float()):
            raise UserError(
                f"{adapter.folder / WEIGHTS}: its head is not the embedding, but the base ties them"
            )


@contextmanager
def _opened(adapter: Adapter) -> Iterator[safe_open]:
    """The file of weights. Raises UserError if it is damaged."""
    path = adapter.folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
