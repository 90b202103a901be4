"""An adapter as the native library reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER

from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.generation.adapted_rows import INTO_MLP, LAYERS, PackedAdapter, numbered
from gptray.generation.native_weights import DTYPES, Rooms, woven
from gptray.model.adapter_files import LowRank
from gptray.native import abi
from gptray.native.abi import LANES, PANEL, RANK_STEP


class NativeAdapter(PackedAdapter):
    """An adapter in fp32 or bf16 (kind), whose products are summed in fp32.

    rank: the greatest of its layers.
    """

    def __init__(
        self, layers: Mapping[str, LowRank], config: ModelConfig, kind: int, rooms: Rooms
    ) -> None:
        self._kept: list[Tensor] = []
        self._rooms = rooms
        self._kind, self._is_gated = kind, config.mlp == "swiglu"
        table = [self._packed(*one) for one in enumerate(numbered(layers, config))]
        self.rank = max(one.rank for one in table)
        end = self._packed(len(table), None)
        array = (abi.LowRank * (len(table) + 1))(*table, end)
        self.table = ctypes.cast(array, POINTER(abi.LowRank))

    def _packed(self, number: int, layer: LowRank | None) -> abi.LowRank:
        if layer is None:
            return abi.LowRank(None, None, 0, self._kind, 0)
        a, b = layer.a, layer.b
        if self._is_gated and LAYERS[number % len(LAYERS)] == INTO_MLP:
            b = woven(b)
        more = -len(a) % RANK_STEP
        a = F.pad(a, (0, -a.size(1) % LANES, 0, more))
        b = F.pad(b, (0, more, 0, -len(b) % PANEL))
        steps = a.view(-1, RANK_STEP, a.size(1) // LANES, LANES).transpose(1, 2)
        panels = b.view(-1, PANEL, len(a)).transpose(1, 2)
        dtype = DTYPES[self._kind]
        placed = [self._rooms.place(one.shape, dtype).copy_(one) for one in (steps, panels)]
        self._kept += placed
        return abi.LowRank(*(one.data_ptr() for one in placed), len(a), self._kind, a.size(1))


def tables(adapters: Sequence[PackedAdapter | None]) -> tuple[object, int]:
    """Of each row: what the library is given, None if no row has one; and the greatest rank."""
    found, most = (POINTER(abi.LowRank) * len(adapters))(), 0
    for row, adapter in enumerate(adapters):
        if adapter is not None:
            assert isinstance(adapter, NativeAdapter)
            found[row] = adapter.table
            most = max(most, adapter.rank)
    return (found if most else None), most
