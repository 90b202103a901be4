"""What a config asks of prepared data, and the folder where the answer belongs.

Equal requests share a folder; a change of source, tokenizer, split, seed or fraction makes another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from gptray.config import Config, UserError
from gptray.data.builtin import builtin_version
from gptray.data.sources import BUILTIN, SourceFile, file_sha256, find_files
from gptray.data.tokenizer_files import (
    END_OF_TEXT,
    KINDS,
    tokenizer_path,
    tokenizer_sha256,
)
from gptray.data.tokens import FORMAT_VERSION

# Up to this size the text itself is the identity, so that a copy or a touched file is no other
# source; beyond, path, size and time of change stand for it.
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Request:
    """The part of a config that prepared data depends on, with its source found."""

    files: tuple[SourceFile, ...]  # none: builtin
    text_column: str
    tokenizer: str  # bpe, char, a path or a hub id
    vocab_size: int
    split: tuple[float, ...]
    fraction: float
    seed: int
    root: Path  # of all prepared data
    eos_token: str | None = None
    key: str = "data.source"  # the config's name for the source, in messages

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides about reuse, and is kept in the manifest."""
        columns = any(file.format != "txt" for file in self.files)
        return {
            "format": FORMAT_VERSION,
            "sources": _identities(self.files) or builtin_version(),
            **({"text_column": self.text_column} if columns else {}),
            "tokenizer": self._tokenizer_identity(),
            "split": list(self.split),
            "fraction": self.fraction,
            "seed": self.seed,
        }

    def _tokenizer_identity(self) -> dict[str, Any]:
        if self.tokenizer in KINDS:
            size = {"vocab_size": self.vocab_size} if self.tokenizer == "bpe" else {}
            return {"kind": self.tokenizer, **size}
        eos = {} if self.eos_token is None else {"eos_token": self.eos_token}
        path = tokenizer_path(self.tokenizer)
        if path is None:
            return {"kind": "hub", "id": self.tokenizer, **eos}
        return {"kind": "folder", "sha256": tokenizer_sha256(path), **eos}

    @property
    def data_dir(self) -> Path:
        """Where the prepared data belongs: a readable label and a hash of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        label = PurePosixPath(self.files[0].path).name.partition(".")[0] if self.files else BUILTIN
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", label).strip("-")[:40] or "text"
        return self.root / f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def make_request(config: Config) -> Request:
    """Find the sources of a config. Raises UserError for what is not there or cannot be read."""
    return _request(config, config.data.source, "data.source", split=config.data.split)


def whole_request(config: Config, source: str | Sequence[str], *, key: str) -> Request:
    """Find a text that is not to be split: all of it is the split `test`; `key` says where from.

    Raises UserError as `make_request` does.
    """
    whole = config.model_copy(update={"data": config.data.model_copy(update={"fraction": 1.0})})
    return _request(whole, source, key, split=(1.0,))


def _request(
    config: Config, source: str | Sequence[str], key: str, *, split: tuple[float, ...]
) -> Request:
    if "://" in config.storage_path:
        raise UserError(
            f"storage_path={config.storage_path}: token shards are memory-mapped; "
            "give a folder that every node sees"
        )
    data, tokenizer = config.data, tokenizer_name(config)
    if tokenizer in KINDS and data.eos_token not in (None, END_OF_TEXT):
        raise UserError(
            f"data.eos_token={data.eos_token!r}: a tokenizer made here ({tokenizer}) ends texts "
            f"with {END_OF_TEXT!r}; leave it out"
        )
    files = [] if source in (BUILTIN, [BUILTIN]) else find_files(source, key=key)
    if files and not any(file.size for file in files):
        raise UserError(f"{key}: there is no text in it")
    return Request(
        files=tuple(files),
        text_column=data.text_column,
        tokenizer=tokenizer,
        vocab_size=data.vocab_size,
        split=split,
        fraction=data.fraction,
        seed=config.seed if data.seed is None else data.seed,
        root=Path(config.storage_path).expanduser().absolute() / "data",
        eos_token=data.eos_token,
        key=key,
    )


def tokenizer_name(config: Config) -> str:
    """bpe, char, a path or a hub id: as set, else that of the model to start from, else bpe."""
    return config.data.tokenizer or config.model.init_from or "bpe"


def _identities(files: Sequence[SourceFile]) -> list[list[str | int]]:
    local = all(file.uri is None for file in files)
    if local and sum(file.size for file in files) <= _HASHED_BYTES:
        return [[PurePosixPath(f.path).suffix, f.size, file_sha256(f)] for f in files]
    return [[f.name, f.size, f.modified] for f in files]
