"""LoRA while decoding: every row of a step may use a different adapter of the same base.

The base's weights are read once for all rows; an adapter's low-rank product is added to its own
rows only. Hu et al. 2022, LoRA; Sheng et al. 2023, S-LoRA. Shapes: N rows of a step.
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

# A block's linear layers, in the order in which `Layer` numbers them.
INTO_MLP = "mlp.c_fc"
LAYERS = ("attn.c_attn", "attn.c_proj", INTO_MLP, "mlp.c_proj")


def output_factors(name: str, config: ModelConfig) -> Tensor | None:
    """The factors of a layer's outputs (out,) that decoders fold into its weights; None: all 1.

    name: one of LAYERS. The scale of attention's scores is in the rows that make queries, unless a
    norm comes after them.
    """
    factors = None
    if name == "attn.c_attn" and not config.qk_norm:
        factors = torch.ones((config.n_head + 2 * config.kv_heads) * config.head_width)
        factors[: config.n_head * config.head_width] = config.score_scale
    elif name.endswith("c_proj") and config.residual_multiplier != 1:
        factors = torch.full((config.n_embd,), config.residual_multiplier)
    return factors


@dataclass(frozen=True)
class Layer:
    """A linear layer of a network, and its number, counted through all blocks."""

    number: int
    product: Product


class RunLayer(Protocol):
    """Runs a layer over a step's rows x (N, in); `add` as in `Product`."""

    def __call__(self, layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor: ...


def run_plain(layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor:
    """Run a layer without adapters."""
    return layer.product(x, add)


class PackedAdapter:
    """An adapter packed for one kind of decoder, which alone can read it."""


def numbered_layers(layers: Mapping[str, LowRank], config: ModelConfig) -> list[LowRank | None]:
    """An adapter's products by layer number: block after block, each in the order of LAYERS.

    layers: by parameter name. `output_factors` are folded in, as in the decoders' own weights.
    """
    found: list[LowRank | None] = []
    for layer in range(config.n_layer):
        for name in LAYERS:
            one = layers.get(f"transformer.h.{layer}.{name}.weight")
            if one and (factors := output_factors(name, config)) is not None:
                one = LowRank(one.a, one.b * factors[:, None])
            found.append(one)
    return found


class TorchAdapter(PackedAdapter):
    """An adapter for the PyTorch decoder, in the dtype that the network computes in."""

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
            (packed(one.a), packed(one.b)) if one else None
            for one in numbered_layers(layers, config)
        ]


class AdaptedRows:
    """A step's rows, grouped by adapter. A row's result does not depend on the other groups."""

    def __init__(self, adapters: Sequence[PackedAdapter | None], device: torch.device) -> None:
        """adapters: one for each row, or None."""
        rows: dict[TorchAdapter, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                assert isinstance(adapter, TorchAdapter)
                rows.setdefault(adapter, []).append(row)
        self._groups = [(one, torch.tensor(own, device=device)) for one, own in rows.items()]
        self._rows, self._count, self._device = rows, len(adapters), device
        self._parts: dict[tuple[bool, ...], list[Tensor]] = {}

    def run(self, layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Run a layer, and add to each row what its adapter makes of it."""
        added: Tensor | None = None
        for adapter, rows in self._groups:
            if pair := adapter.layers[layer.number]:
                down, up = pair
                delta = up(down(x[rows]))
                added = delta.new_zeros(len(x), delta.size(1)) if added is None else added
                added[rows] = delta
        if added is None:
            return layer.product(x, add)
        if LAYERS[layer.number % len(LAYERS)] != INTO_MLP:
            return layer.product(x, added if add is None else add + added)
        # An activation fused into its product rounds differently from one applied after an
        # addition, so rows without an adapter must take the fused one.
        y = torch.empty_like(added)
        plain, adapted = self._split_rows(layer.number)
        if len(plain):
            y[plain] = layer.product(x[plain])
        y[adapted] = layer.product(x[adapted], added[adapted])
        return y

    def _split_rows(self, layer: int) -> list[Tensor]:
        """The rows to which a layer's adapters add nothing, and the others.

        Worked out on the host: a mask on the GPU would make the host wait for it in every layer.
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
