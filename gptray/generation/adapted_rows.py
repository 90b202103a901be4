"""Adapters in decoders: many adapters of one base, each for some rows of a step.

The base's weights are read once for all rows; each row with an adapter gets that adapter's product
of two narrow matrices added. Hu et al. 2022, LoRA; Sheng et al. 2023, S-LoRA. Shapes: N rows, R
rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptray.config import ModelConfig
from gptray.generation.products import Product, product
from gptray.model.adapter_files import LowRank

# Of a block, in the order of their numbers.
QUERIES, INTO_MLP = "attn.c_attn", "mlp.c_fc"
LAYERS = (QUERIES, "attn.c_proj", INTO_MLP, "mlp.c_proj")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a network, and its number among all of its blocks."""

    number: int
    product: Product


class Run(Protocol):
    """How a step runs a layer over its rows: x (N, in), and `add` as of `Product`."""

    def __call__(self, layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor: ...


def run_plain(layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor:
    """Without adapters."""
    return layer.product(x, add)


class PackedAdapter:
    """An adapter in the form of one decoder, which alone looks into it."""


def numbered(layers: Mapping[str, LowRank], config: ModelConfig) -> list[LowRank | None]:
    """What an adapter adds to the layers of every block in turn, in the order of LAYERS.

    layers: by the parameters' names. Queries are scaled where a decoder's weights are.
    """
    found: list[LowRank | None] = []
    for layer in range(config.n_layer):
        for name in LAYERS:
            one = layers.get(f"transformer.h.{layer}.{name}.weight")
            if one and name == QUERIES and not config.qk_norm:
                b = one.b.clone()
                b[: config.n_head * config.head_width] *= config.head_width**-0.5
                one = LowRank(one.a, b)
            found.append(one)
    return found


class Products(PackedAdapter):
    """An adapter as products of PyTorch, in the dtype that a network computes in."""

    def __init__(
        self,
        layers: Mapping[str, LowRank],
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def packed(weight: Tensor) -> Product:
            return product(weight.to(device), None, dtype)

        self.layers = [
            (packed(one.a), packed(one.b)) if one else None for one in numbered(layers, config)
        ]


class AdaptedRows:
    """The rows of a step by their adapters; a row's product is the same whatever others have."""

    def __init__(self, adapters: Sequence[PackedAdapter | None], device: torch.device) -> None:
        """adapters: each row's."""
        rows: dict[Products, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                assert isinstance(adapter, Products)
                rows.setdefault(adapter, []).append(row)
        self._groups = [(one, torch.tensor(own, device=device)) for one, own in rows.items()]
        self._rows, self._count, self._device = rows, len(adapters), device
        self._parts: dict[tuple[bool, ...], list[Tensor]] = {}

    def run(self, layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor:
        """With what the rows' adapters add."""
        if not self._groups:
            return layer.product(x, add)
        added: Tensor | None = None
        for adapter, rows in self._groups:
            if pair := adapter.layers[layer.number]:
                narrow, wide = pair
                made = wide(narrow(x[rows]))
                added = made.new_zeros(len(x), made.size(1)) if added is None else added
                added[rows] = made
        if added is None:
            return layer.product(x, add)
        if LAYERS[layer.number % len(LAYERS)] != INTO_MLP:
            return layer.product(x, added if add is None else add + added)
        # A GELU that is one with its product rounds otherwise than one after a sum.
        y = torch.empty_like(added)
        plain, adapted = self._parted(layer.number)
        if len(plain):
            y[plain] = layer.product(x[plain])
        y[adapted] = layer.product(x[adapted], added[adapted])
        return y

    def _parted(self, layer: int) -> list[Tensor]:
        """The rows to which a layer's adapters add nothing, and the others.

        The host knows them: to find them by a mask it would wait for a GPU in every layer.
        """
        adds = tuple(adapter.layers[layer] is not None for adapter in self._rows)
        if adds not in self._parts:
            groups = zip(self._rows.values(), adds, strict=True)
            adapted = {row for rows, is_adding in groups if is_adding for row in rows}
            self._parts[adds] = [
                torch.tensor(sorted(part), dtype=torch.int64, device=self._device)
                for part in (set(range(self._count)) - adapted, adapted)
            ]
        return self._parts[adds]
