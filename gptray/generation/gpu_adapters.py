"""LoRA in a GPU's passes: each row names its adapter by an address, so adapters may come and go.

A pass recorded as a CUDA graph reads the addresses anew each time it runs, and of an adapter's
table its layers' ranks and weights. Chen et al. 2023, Punica; Sheng et al. 2023, S-LoRA.
Shapes: N rows, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gptray.config import ModelConfig
from gptray.generation.adapted_rows import LAYERS, Layer, PackedAdapter, numbered_layers
from gptray.generation.gpu_kernels import TILE_ROWS, kernels_for
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT

# Ranks and outputs of a block; inputs of one and of a chunk, which a program multiplies by itself.
# None depends on the number of rows or on other adapters, or else a row's rounding would, too.
_RANKS, _OUTPUTS, _INPUTS, _CHUNK = 32, 128, 64, 1024
# The rank of an adapter that is tried when a decoder opens: more than a block.
_TRIED_RANK = 40


class GpuAdapter(PackedAdapter):
    """An adapter on a GPU.

    address: of its table, (layers, 3) int64: each layer's rank R, 0 if it has none, and the
    addresses of A (R, in) and B^T (R, out). rank: the largest.
    """

    def __init__(
        self,
        layers: Mapping[str, LowRank],
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def kept(weight: Tensor) -> Tensor:
            return weight.to(device, dtype).contiguous()

        self.pairs = [
            (kept(one.a), kept(one.b.T)) if one else None for one in numbered_layers(layers, config)
        ]
        entries = [
            (len(pair[0]), pair[0].data_ptr(), pair[1].data_ptr()) if pair else (0, 0, 0)
            for pair in self.pairs
        ]
        self._table = torch.tensor(entries, dtype=torch.int64, device=device)
        self.address, self.rank = self._table.data_ptr(), max(rank for rank, _, _ in entries)
        _by_address[self.address] = self

    @classmethod
    def tried(cls, model: GPT, dtype: torch.dtype, device: torch.device) -> GpuAdapter:
        """One of all layers with random numbers, the same each time."""
        generator, layers = torch.Generator().manual_seed(0), dict[str, LowRank]()
        for layer in range(model.config.n_layer):
            for name in LAYERS:
                weight = f"transformer.h.{layer}.{name}.weight"
                outputs, inputs = model.get_parameter(weight).shape
                a = torch.randn(_TRIED_RANK, inputs, generator=generator) / math.sqrt(inputs)
                b = torch.randn(outputs, _TRIED_RANK, generator=generator) / 20
                layers[weight] = LowRank(a, b)
        return cls(layers, model.config, dtype, device)


_by_address: WeakValueDictionary[int, GpuAdapter] = WeakValueDictionary()


def addresses(adapters: Sequence[PackedAdapter | None]) -> list[int]:
    """The addresses of rows' adapters; 0: none."""
    found = [0] * len(adapters)
    for row, one in enumerate(adapters):
        if one is not None:
            assert isinstance(one, GpuAdapter)
            found[row] = one.address
    return found


@dataclass(frozen=True)
class GpuAdaptedRows:
    """A pass's rows. adapters: their `addresses`, (N,); slots and tiles as in `gpu_kernels.attend`.

    room: at least the rank of each adapter.
    """

    adapters: Tensor
    slots: Tensor
    tiles: Tensor | None
    room: int

    def run(self, layer: Layer, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Run a layer, which has no activation, and add to each row what its adapter makes of it.

        Rows without an adapter keep the layer's bits.
        """
        y = layer.product(x, add)
        add_low_rank(y, x, layer.number, self)
        return y


def add_low_rank(y: Tensor, x: Tensor, layer: int, rows: GpuAdaptedRows) -> None:
    """Add x A^T B^T of each row's adapter to y (N, out), for x (N, in)."""
    kernels = kernels_for(x)
    if kernels is None:
        _add_low_rank(y, x, layer, rows.adapters)
        return
    x, (N, inputs), outputs = x.contiguous(), x.shape, y.size(1)
    where = rows.adapters, rows.slots, rows.tiles
    tiles, chunks = N if rows.tiles is None else len(rows.tiles), -(-inputs // _CHUNK)
    sums = x.new_empty(N, chunks, rows.room, dtype=torch.float32)
    kernels.adapters.shrink_kernel[(tiles, chunks)](
        *(x, *where, sums, N, inputs, rows.room, layer),
        ROWS=TILE_ROWS,
        RANKS=_RANKS,
        BLOCK_K=_INPUTS,
        CHUNK=_CHUNK,
    )
    kernels.adapters.expand_kernel[(tiles, -(-outputs // _OUTPUTS))](
        *(sums, *where, y, N, outputs, rows.room, layer),
        CHUNKS=chunks,
        ROWS=TILE_ROWS,
        RANKS=_RANKS,
        BLOCK_N=_OUTPUTS,
    )


def _add_low_rank(y: Tensor, x: Tensor, layer: int, adapters: Tensor) -> None:
    for row, address in enumerate(adapters.tolist()):
        pair = _by_address[address].pairs[layer] if address else None
        if pair:
            a, b = (weight.float() for weight in pair)
            narrow = (a * x[row].float()).sum(1).to(x.dtype).float()
            y[row] = (y[row].float() + (narrow[:, None] * b).sum(0)).to(y.dtype)
