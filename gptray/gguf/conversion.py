"""Opens a GGUF file as a model: converts it once to a Hugging Face folder in this node's cache.

The folder is identified by the file's path, size and time, and appears atomically. Needs neither
torch nor Ray, so a job can check a model before it starts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gptray.config import UserError
from gptray.gguf.layout import read_header
from gptray.gguf.network_config import network_json
from gptray.gguf.tensors import (
    check_entries,
    has_own_head,
    rotary_tensors,
    weights_of,
    write_weights,
)
from gptray.gguf.tokenizer_json import end_ids, special_ids, special_tokens, tokenizer_json
from gptray.storage.files import cached_as, expanded, storing
from gptray.storage.node_cache import made_once, make_room
from gptray.storage.stored import Unreadable

log = logging.getLogger("gptray")

SUFFIX = ".gguf"
_WEIGHTS = "model.safetensors"


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return str(path).endswith(SUFFIX) and os.path.isfile(path)


def opened_gguf(path: Path) -> Path:
    """The folder on this node with a GGUF file's model.

    Raises UserError for a damaged file and for an unsupported model or tokenizer, RunFailed if the
    disk is full.
    """
    path = path.resolve()
    status = path.stat()
    state = repr((str(path), status.st_size, status.st_mtime_ns))
    folder = cached_as("copied", state)
    return made_once(folder, lambda draft: _convert(draft, path, status.st_size), what=str(path))


@contextmanager
def named_as_given(folder: Path, source: str | Path) -> Iterator[None]:
    """Make errors about a folder that was converted from a GGUF file name that file.

    folder: that of the model `source`, of whatever kind. Raises UserError.
    """
    try:
        yield
    except UserError as error:
        if not is_gguf(expanded(source)):
            raise
        message = str(error)
        for file in (f"{folder}/config.json", f"{folder}/{_WEIGHTS}", str(folder)):
            message = message.replace(file, str(source))
        raise UserError(message.replace("config.json", "its header")) from None


def _convert(draft: Path, path: Path, size: int) -> None:
    """Convert a GGUF file of `size` bytes to a folder. Raises as `opened_gguf` does."""
    log.info("reading %s", path)
    try:
        fields, entries = read_header(path)
        _check_kind(fields)
        check_entries(entries, size)
        tied, factors = not has_own_head(path, entries), rotary_tensors(path, entries)
        network = network_json(fields, entries, tied=tied, factors=factors)
        weights = weights_of(fields, entries, network)
        files = _files(fields, network)
        with storing(draft):
            make_room(sum(weight.size for weight in weights.values()))
            for file, content in files.items():
                text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
                (draft / file).write_text(text, "utf-8")
            write_weights(draft / _WEIGHTS, path, weights)
    except (UserError, Unreadable) as error:
        raise UserError(f"{path}: {error}") from None


def _check_kind(fields: Mapping[str, object]) -> None:
    """Raise UserError for a part of a model, and for other things in the same format."""
    kind, parts = fields.get("general.type", "model"), fields.get("split.count", 1)
    if kind != "model":
        raise UserError(f"its general.type is {kind!r:.40}; only a 'model' can be opened")
    if parts != 1:
        tool = "llama.cpp's llama-gguf-split --merge"
        raise UserError(f"it is one of {parts} parts of a model; {tool} joins them")


def _files(fields: Mapping[str, object], network: Mapping[str, object]) -> dict[str, object]:
    """The contents of the folder's JSON files. Raises UserError."""
    special, ids = special_tokens(fields), special_ids(fields)
    template = fields.get("tokenizer.chat_template")
    return {
        "config.json": {**network, **ids, "dtype": "float32"},
        "generation_config.json": {
            "bos_token_id": ids.get("bos_token_id"),
            "eos_token_id": end_ids(fields),
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
