"""Writes the weights of a GGUF file as safetensors, a few rows at a time.

fp32, fp16 and bf16 keep their type; other types become fp32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.config import UserError
from gptray.gguf.layout import Entry
from gptray.gguf.naming_table import EMBEDDING, HEAD
from gptray.gguf.network_config import FACTORS, family_of_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

# Types that are kept, by GGML's number: safetensors' name, and bytes per number.
_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
# Numbers that are decoded at a time.
_AT_ONCE = 1 << 22
_MAX_FACTORS = 1 << 12


@dataclass(frozen=True)
class Weight:
    """A weight to store. order: for each of its rows, the row in the GGUF file. less: subtract it
    from the file's numbers."""

    entry: Entry
    transposed: bool
    order: list[int] | None
    less: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    @property
    def dtype(self) -> tuple[str, int]:
        """safetensors' name of the type, and bytes per number."""
        return _PLAIN.get(self.entry.kind, ("F32", 4))

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.dtype[1] * math.prod(self.shape)


def check_entries(entries: Sequence[Entry], size: int) -> None:
    """Raise UserError for a tensor of unknown type or outside the file, which has `size` bytes."""
    left = size
    for entry in entries:
        left -= _bytes_of(entry)
        if left < 0 or entry.start + _bytes_of(entry) > size:
            raise UserError(f"{entry.name} is outside the file")


def weights_of(
    fields: Mapping[str, object], entries: Sequence[Entry], config: Mapping[str, object]
) -> dict[str, Weight]:
    """The weights by Hugging Face's names.

    config: config.json. Raises UserError for an unknown weight or a wrong shape.
    """
    family, found = family_of_file(fields), dict[str, Weight]()
    for entry in entries:
        if entry.name in FACTORS or (entry.name == HEAD and config["tie_word_embeddings"]):
            continue
        named = family.hf_name(entry.name)
        if named is None:
            raise UserError(f"{entry.name:.60} is not a weight of {family.architecture}")
        name, part = named
        rows = entry.shape[0]
        order = family.row_order(part, rows, config)
        if order is not None and len(order) != rows:
            raise UserError(f"{entry.name} has {rows:,} rows, which are not whole heads")
        back = sorted(range(rows), key=order.__getitem__) if order is not None else None
        less = 1 if family.is_centred and len(entry.shape) == 1 else 0
        if less and entry.kind:
            raise UserError(f"{entry.name} is not stored in fp32")
        turned = part in family.transposed and len(entry.shape) == 2
        found[name] = Weight(entry, turned, back, less)
    return found


def has_own_head(path: Path, entries: Sequence[Entry]) -> bool:
    """Whether a file has a head that differs from its embedding."""
    import numpy as np

    named = {entry.name: entry for entry in entries}
    head, embedding = named.get(HEAD), named.get(EMBEDDING)
    if head is None or embedding is None:
        return head is not None
    if (head.shape, head.kind) != (embedding.shape, embedding.kind):
        return True
    pairs = zip(_raw_rows(path, head), _raw_rows(path, embedding), strict=True)
    return not all(np.array_equal(one, other) for one, other in pairs)


def rotary_tensors(path: Path, entries: Sequence[Entry]) -> dict[str, list[float]]:
    """The tensors of FACTORS that the file has. Raises UserError for an absurd shape."""
    found = {}
    for entry in entries:
        if entry.name not in FACTORS:
            continue
        if len(entry.shape) != 1 or entry.shape[0] > _MAX_FACTORS or entry.kind:
            raise UserError(f"{entry.name} has shape {list(entry.shape)}")
        parts = _parts(path, Weight(entry, False, None))
        found[entry.name] = [float(one) for part in parts for one in part.flat]
    return found


def write_weights(path: Path, source: Path, weights: Mapping[str, Weight]) -> None:
    """Write the weights as safetensors. Raises UserError for an unsupported type."""
    import numpy as np

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in sorted(weights.items()):
        start, end = end, end + weight.size
        kind, _ = weight.dtype
        header[name] = {"dtype": kind, "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, weight in sorted(weights.items()):
            parts = _parts(source, weight)
            for part in [np.concatenate([*parts]).T] if weight.transposed else parts:
                file.write(np.ascontiguousarray(part).data)


def _bytes_of(entry: Entry) -> int:
    """The size of a tensor in bytes. Raises UserError for an unknown type."""
    import gguf

    kinds = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    if entry.kind not in kinds:
        raise UserError(f"{entry.name} has an unknown type, {entry.kind}")
    weights, size = kinds[entry.kind]
    if not entry.shape or not all(entry.shape) or entry.shape[-1] % weights:
        raise UserError(f"{entry.name} has shape {list(entry.shape)}, not rows of {weights}")
    return math.prod(entry.shape) // weights * size


def _parts(source: Path, weight: Weight) -> Iterator[Array]:
    """Yield a tensor's rows in their new order, a few at a time, in the type to store.

    Raises UserError for an unsupported type.
    """
    import gguf
    import numpy as np

    entry, kind = weight.entry, gguf.GGMLQuantizationType(weight.entry.kind)
    plain = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}.get(kind.name)
    for rows in _raw_rows(source, entry, weight.order):
        if plain is not None:
            numbers = rows.view(plain)
            yield numbers - np.float32(weight.less) if weight.less else numbers
            continue
        try:
            yield gguf.dequantize(rows, kind)
        except NotImplementedError:
            raise UserError(
                f"{entry.name} is stored as {kind.name}, which is not supported"
            ) from None


def _raw_rows(
    source: Path, entry: Entry, order: list[int] | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of a tensor's rows, some at a time; each number of a vector is a row."""
    import numpy as np

    is_plain_vector = len(entry.shape) == 1 and entry.kind in _PLAIN
    rows = math.prod(entry.shape) if is_plain_vector else math.prod(entry.shape[:-1])
    step = max(1, _AT_ONCE // (1 if is_plain_vector else entry.shape[-1]))
    for start in range(0, rows, step):
        # Mapped anew each time: pages that were read count as this process's memory.
        data = np.memmap(source, np.uint8, "r", entry.start, (rows, _bytes_of(entry) // rows))
        yield np.array(data[order[start : start + step] if order else slice(start, start + step)])
