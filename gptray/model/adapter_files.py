"""The weights of adapters in PEFT's folders: saves, loads and merges them into their base.

`gptray.model.adapter_folder` checks what a folder must contain.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptray.config import LoraConfig, ModelConfig, UserError
from gptray.model.adapter import (
    BASE_QUANTIZED,
    BASE_SHA256,
    CONFIG,
    PREFIX,
    WEIGHTS,
    A,
    B,
    Base,
    adapted_parts,
    module_of,
    needs_head_copy,
    peft_config,
    replaced_parts,
)
from gptray.model.adapter_folder import Adapter, check_products, open_adapter
from gptray.model.frozen_base import load_base
from gptray.model.gpt import GPT
from gptray.model.hf import from_file, load_pretrained, save_pretrained, to_file
from gptray.model.importance import base_importance
from gptray.model.lora import LoRALinear, add_adapters, freeze
from gptray.model.parameters import HEAD, Part
from gptray.model.quantized import quantize
from gptray.model.tensor_file import write_tensors
from gptray.model.unread import unread_network
from gptray.storage.files import replacing


def adapted_network(
    base: Base,
    lora: LoraConfig,
    config: ModelConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    native: bool = False,
    seed: int = 0,
    load: Callable[[GPT, Base], None] = load_base,
) -> GPT:
    """The frozen base with a new adapter, on the CPU, computing in `dtype`.

    config: the base's network, perhaps with another dropout or context. vocab_size: rows of the
    embedding that are tokens. native: use the native kernels. load: a function of
    `gptray.model.frozen_base`. Raises UserError for targets that the base does not have, and as
    `load_weights` does.
    """
    adapted, replaced = adapted_parts(base, lora.targets), replaced_parts(base, lora.train)
    with torch.device("meta"):
        model = GPT(config, vocab_size=vocab_size)
    model.compute_dtype = dtype
    if native:
        model.use_kernels()
    # Before loading, so that the weights arrive in the dtype in which they are kept.
    freeze(model, replaced, base.quantized)
    load(model, base)
    add_adapters(model, lora, adapted, seed=seed)
    return model


def save_adapter(model: GPT, folder: Path, base: Base, lora: LoraConfig) -> None:
    """Write a network's adapter, and its other trained weights, as PEFT's folder, in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = dict[str, Tensor]()
    for part in adapted_parts(base, lora.targets):
        a, b = _pair(model, part)
        tensors[PREFIX + module_of(part) + A] = a
        tensors[PREFIX + module_of(part) + B] = _reordered(b, part, model.config, to_file)
    for part in replaced_parts(base, lora.train):
        weight = parameters[part.parameter].detach()[part.start : part.start + part.rows]
        tensors[PREFIX + part.name] = to_file(weight, part, model.config)
    if needs_head_copy(base, lora):
        tensors[PREFIX + HEAD] = model.head.detach()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = {"format": "pt", BASE_SHA256: base.sha256, BASE_QUANTIZED: base.quantized}
    with replacing(folder / WEIGHTS) as path:
        write_tensors(path, shapes, lambda name: tensors[name], metadata)
    with replacing(folder / CONFIG) as path:
        path.write_text(json.dumps(peft_config(base, lora), indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: GPT, folder: Path, base: Base) -> None:
    """Load the weights that `save_adapter` wrote into a network's adapter.

    Raises UserError, also if the base was quantized differently.
    """
    adapter, parameters = open_adapter(folder, base), dict(model.named_parameters())
    if adapter.quantized != base.quantized:
        raise UserError(
            f"{folder} was trained on a base with quantize.weights={adapter.quantized}, not "
            f"{base.quantized}"
        )
    stored = _tensors(adapter)
    for part in adapter.adapted:
        a, b = _pair(model, part)
        name = PREFIX + module_of(part)
        a.copy_(stored[name + A])
        b.copy_(_reordered(stored[name + B], part, model.config, from_file))
    for part, weight in _present(adapter.replaced, parameters):
        weight.copy_(from_file(stored[PREFIX + part.name], part, model.config))


def load_merged(base: Base, adapter: Adapter) -> GPT:
    """The base with the adapter merged, an ordinary network on the CPU in fp32. Raises UserError.

    If the base was quantized while the adapter was trained, its weights are rounded in the same
    way.
    """
    model, stored = load_pretrained(base.folder), _tensors(adapter)
    _merge(base, dict(model.named_parameters()), adapter, stored)
    head = stored.get(PREFIX + HEAD) if model.config.tie_word_embeddings else None
    if head is not None and not torch.equal(head.float(), model.head.float()):
        raise UserError(
            f"{adapter.folder / WEIGHTS}: its head is not the embedding, but the base ties them"
        )
    return model


def save_merged(
    base: Base,
    adapter: Adapter,
    folder: Path,
    *,
    vocab_size: int,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | None,
) -> None:
    """Write the model of `load_merged` one weight at a time, without a model in memory.

    vocab_size: rows of the embedding that are tokens; the others are left out.
    Raises UserError for damaged files.
    """
    model = unread_network(base.folder)
    model.valid_vocab_size = vocab_size
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    read, tensors = model.full_tensor, _tensors(adapter)

    def full_tensor(parameter: Tensor) -> Tensor:
        merged = read(parameter)
        _merge(base, {names[id(parameter)]: merged}, adapter, tensors)
        return merged

    model.full_tensor = full_tensor
    save_pretrained(model, folder, eos_token_id=eos_token_id, bos_token_id=bos_token_id)


@dataclass(frozen=True)
class LowRank:
    """The term that an adapter adds to a linear layer: x A^T B^T, a (R, inputs), b (outputs, R).

    In fp32, with the scale folded into B. For layers that are fused in the network, R is the sum of
    their ranks.
    """

    a: Tensor
    b: Tensor


def load_low_rank(base: Base, adapter: Adapter) -> dict[str, LowRank]:
    """The low-rank terms of an adapter, by the names of the network's parameters.

    Raises UserError for files that are damaged or not finite, and for an adapter that replaces
    weights (see `gptray.model.adapter_folder.check_products`).
    """
    check_products(adapter)
    stored = _tensors(adapter)
    parts = dict[str, list[Part]]()
    for part in adapter.adapted:
        parts.setdefault(part.parameter, []).append(part)
    outputs = Counter[str]()
    for part in base.parts:
        outputs[part.parameter] += part.rows
    found = {}
    for parameter, own in parts.items():
        each = [stored[PREFIX + module_of(part) + A].float() for part in own]
        a, b = torch.cat(each), torch.zeros(outputs[parameter], sum(map(len, each)))
        for part, ranks in zip(own, torch.split(b, list(map(len, each)), 1), strict=True):
            narrow = stored[PREFIX + module_of(part) + B].float()
            rows = _reordered(narrow, part, base.config, from_file)
            ranks[part.start : part.start + part.rows] = adapter.lora_of(part).scale * rows
        found[parameter] = LowRank(a, b)
    return found


def load_adapted(source: str | Path, adapter: str | Path | None) -> GPT:
    """As `load_pretrained`, with the adapter in a folder merged if there is one."""
    if adapter is None:
        return load_pretrained(source)
    base = Base.of(str(source))
    return load_merged(base, open_adapter(adapter, base))


def _pair(model: GPT, part: Part) -> tuple[Tensor, Tensor]:
    """A and B of an adapted part."""
    layer = model.get_submodule(part.parameter.removesuffix(".weight"))
    assert isinstance(layer, LoRALinear)
    return next(
        (a.detach(), b.detach()) for span, a, b in layer.pairs() if span.start == part.start
    )


def _reordered(
    b: Tensor,
    part: Part,
    config: ModelConfig,
    convert: Callable[[Tensor, Part, ModelConfig], Tensor],
) -> Tensor:
    """B with its outputs in the file's or the network's order; B is never transposed."""
    return b if part.layout == "transposed" else convert(b, part, config)


@torch.no_grad()
def _merge(
    base: Base, parameters: Mapping[str, Tensor], adapter: Adapter, stored: Mapping[str, Tensor]
) -> None:
    """Merge the adapter into parameters of the base, by their names in the network, in place."""
    config = base.config
    if adapter.quantized != "none":
        importance = base_importance(base, adapter.quantized)
        for part, weight in _present(base.linear, parameters):
            counts = importance.get(part.parameter)
            weight.copy_(quantize(weight, adapter.quantized, counts).dequantize())
    for part, weight in _present(adapter.adapted, parameters):
        name = PREFIX + module_of(part)
        b = _reordered(stored[name + B], part, config, from_file)
        weight.addmm_(b.float(), stored[name + A].float(), alpha=adapter.lora_of(part).scale)
    for part, weight in _present(adapter.replaced, parameters):
        weight.copy_(from_file(stored[PREFIX + part.name], part, config))


def _present(
    parts: Iterable[Part], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[Part, Tensor]]:
    """Yield the parts that lie in `parameters`, each with its rows."""
    for part in parts:
        if part.parameter in parameters:
            yield part, parameters[part.parameter][part.start : part.start + part.rows]


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the weight file. Raises UserError if they are damaged or not finite."""
    path = adapter.folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    for name, tensor in tensors.items():
        if not bool(tensor.float().sum().isfinite()):
            raise UserError(f"{path}: {name} has numbers that are not finite")
    return tensors
