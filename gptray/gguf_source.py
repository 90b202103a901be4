"""Opens a GGUF file as a model: a Hugging Face folder of it in this node's cache, made once.

A folder is named after the file's path, size and time, and appears by rename. Weights become fp32,
one at a time. Needs neither torch nor Ray, so that a job can check a model before it starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.config import UserError
from gptray.files import cache_folder, open_lock, remove, storing
from gptray.gguf_families import FAMILIES, Family
from gptray.gguf_header import Entry, read_header
from gptray.gguf_tokenizer import special_ids, special_tokens, tokenizer_json
from gptray.manifest import files_damage, write_manifest
from gptray.node_cache import hold, make_room
from gptray.stored import Unreadable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger("gptray")

SUFFIX = ".gguf"
_EMBEDDING = "token_embd.weight"


def is_gguf(path: str | Path) -> bool:
    """Whether it is the path of a GGUF file."""
    return str(path).endswith(SUFFIX) and os.path.isfile(path)


def opened_gguf(path: Path) -> Path:
    """The folder on this node with the model in a GGUF file.

    Raises UserError for a file that is damaged or holds another kind of model or tokenizer,
    RunFailed where the disk takes no more.
    """
    path = path.resolve()
    status = path.stat()
    return _opened(path, status.st_size, status.st_mtime_ns)


@cache
def _opened(path: Path, size: int, modified: int) -> Path:
    """`opened_gguf`, once in a process for each state of the file."""
    name = hashlib.sha256(repr((str(path), size, modified)).encode()).hexdigest()[:24]
    folder = cache_folder() / "copied" / name
    hold(folder)
    with open_lock(folder.with_name(f"{name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the node makes it
        if not folder.is_dir() or files_damage(folder, needed=()):
            _make(folder, path, size)
    return folder


def _make(folder: Path, path: Path, size: int) -> None:
    log.info("reading %s", path)
    try:
        fields, entries = read_header(path)
        files, weights = _files(fields, entries), _weights(fields, entries, size)
    except (UserError, Unreadable) as error:
        raise UserError(f"{path}: {error}") from None
    draft = folder.with_suffix(".draft")
    with storing(folder):
        make_room(sum(4 * math.prod(one.shape) for one in entries))
        remove(draft)  # left by a kill
        draft.mkdir()
        for file, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (draft / file).write_text(text, "utf-8")
        _write_weights(draft / "model.safetensors", path, weights)
        write_manifest(draft)
        remove(folder)  # damaged
        draft.rename(folder)


def _family(fields: Mapping[str, object]) -> Family:
    architecture = fields.get("general.architecture")
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"its architecture {architecture!r:.40} cannot be read; {known} can")


def _files(fields: Mapping[str, object], entries: list[Entry]) -> dict[str, object]:
    """The contents of the folder's files of JSON. Raises UserError."""
    family, special = _family(fields), special_tokens(fields)
    numbers = {
        name: _shortest(fields.get(f"{family.architecture}.{key}"))
        for name, key in family.numbers.items()
    }
    rows = next((one.shape[0] for one in entries if one.name == _EMBEDDING and one.shape), None)
    missing = [family.numbers[name] for name, number in numbers.items() if number is None]
    if missing or rows is None:
        raise UserError(f"it has no {missing[0] if missing else _EMBEDDING}")
    template = fields.get("tokenizer.chat_template")
    return {
        "config.json": {
            "model_type": family.model_type,
            "vocab_size": rows,
            **numbers,
            **special_ids(fields),
            "dtype": "float32",
        },
        "tokenizer.json": tokenizer_json(fields),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **special,
            **({"chat_template": template} if isinstance(template, str) else {}),
        },
    }


def _shortest(value: object) -> object:
    """A number; one that was stored in 32 bits in as few digits as tell it from others."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _weights(
    fields: Mapping[str, object], entries: list[Entry], size: int
) -> dict[str, tuple[Entry, bool]]:
    """The weights by Hugging Face's names, and whether each is to be transposed.

    Raises UserError for one that the family has not, or that is not within the file's `size`.
    """
    family, found = _family(fields), {}
    left = size
    for entry in entries:
        named = family.hf_name(entry.name)
        if named is None:
            raise UserError(f"{entry.name:.60} is not a weight of {family.architecture}")
        left -= _bytes_of(entry)
        if left < 0 or entry.start + _bytes_of(entry) > size:
            raise UserError(f"{entry.name} is outside the file")
        name, part = named
        found[name] = (entry, part in family.transposed and len(entry.shape) == 2)
    return found


def _bytes_of(entry: Entry) -> int:
    """The bytes of a tensor. Raises UserError for a type that is not known."""
    import gguf

    kinds = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    if entry.kind not in kinds:
        raise UserError(f"{entry.name} has an unknown type, {entry.kind}")
    weights, size = kinds[entry.kind]
    if not entry.shape or not all(entry.shape) or entry.shape[-1] % weights:
        raise UserError(f"{entry.name} has shape {list(entry.shape)}, not rows of {weights}")
    return math.prod(entry.shape) // weights * size


def _write_weights(path: Path, source: Path, weights: dict[str, tuple[Entry, bool]]) -> None:
    """Write the weights as safetensors in fp32. Raises UserError for a type that is not read."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (entry, turned) in sorted(weights.items()):
        shape = entry.shape[::-1] if turned else entry.shape
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (entry, turned) in sorted(weights.items()):
            weight = _decoded(source, entry)
            file.write((weight.T if turned else weight).tobytes())


def _decoded(source: Path, entry: Entry) -> npt.NDArray[np.float32]:
    """A tensor's numbers. Raises UserError for a type whose numbers are not known."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(entry.kind)
    rows = (*entry.shape[:-1], _bytes_of(entry) // math.prod(entry.shape[:-1]))
    data = np.memmap(source, np.uint8, "r", entry.start, rows)
    try:
        weight: npt.NDArray[np.float32] = gguf.dequantize(data, kind).reshape(entry.shape)
    except NotImplementedError:
        raise UserError(
            f"{source}: {entry.name} is stored as {kind.name}, which is not read"
        ) from None
    return weight
