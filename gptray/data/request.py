"""The prepared data that a config asks for, and its folder.

Equal requests share a folder; another source, tokenizer, split, seed or fraction gets its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath

from gptray.config import Config, UserError
from gptray.config.names import PREPARED
from gptray.data.builtin import builtin_version
from gptray.data.pieces import Reading
from gptray.data.sources import BUILTIN, Source, SourceFile, file_sha256, find_files
from gptray.data.split import LONG_NAMES, SPLITS, TEST, VAL, split_names
from gptray.data.tokenizer_files import (
    END_OF_TEXT,
    KINDS,
    cached_tokenizer,
    tokenizer_path,
    tokenizer_sha256,
)
from gptray.data.tokenizer_prefix import stored_prefix
from gptray.data.tokens import FORMAT_VERSION
from gptray.storage.files import cache_folder
from gptray.storage.node_cache import storage_folder
from gptray.storage.template_file import template_in

# Sources up to this size are identified by their contents, so that copying or touching a file does
# not make it another source; larger ones by path, size and modification time.
_HASHED_BYTES = 64 << 20
# Usual file names of validation and test text, and the keys for such text.
_NAMES = {
    VAL: re.compile(r"(val|valid|validation|dev|eval)(?![a-z])"),
    TEST: re.compile(r"test(?![a-z])"),
}
_KEYS = {VAL: "data.val_source", TEST: "data.test_source"}


@dataclass(frozen=True)
class Request:
    """The part of a config that prepared data depends on, with its sources found."""

    source: Source
    own: dict[int, Source]  # validation and test text with a key of its own, by label
    reading: Reading
    tokenizer: str  # bpe, char, a path or a hub id
    vocab_size: int
    split: tuple[float, ...]
    fraction: float
    seed: int
    root: Path  # of all prepared data
    eos_token: str | None = None
    warnings: tuple[str, ...] = ()  # what the user should know before the text is read

    @property
    def sources(self) -> list[tuple[Source, dict[int, float]]]:
        """Every source with its shares by label, which add up to 1."""
        shares = {label: x for label, x in enumerate(self.split) if label not in self.own}
        if self.own:
            total = sum(shares.values())
            shares = {label: share / total for label, share in shares.items()}
        return [(self.source, shares), *((own, {label: 1.0}) for label, own in self.own.items())]

    @property
    def local_files(self) -> dict[str, list[Path]]:
        """The files of each source in this machine's file system, by the source's key."""
        return {
            source.key: [Path(file.path) for file in source.files if file.uri is None]
            for source, _ in self.sources
        }

    @property
    def is_of_node(self) -> bool:
        """Whether the data is prepared in this node's own cache, which no other node sees."""
        return self.root.is_relative_to(cache_folder())

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the splits, by label."""
        return split_names(max([len(self.split), *(label + 1 for label in self.own)]))

    @cached_property
    def identity(self) -> dict[str, object]:
        """Everything that the prepared data depends on; kept in the manifest."""
        files = [file for source, _ in self.sources for file in source.files]
        reading = self.reading
        settings = {
            "text_column": reading.text_column if any(f.format != "txt" for f in files) else None,
            "separator": reading.separator if any(f.format == "txt" for f in files) else None,
            "encoding": next((f.encoding for f in files if f.format != "parquet"), None),
        }
        return {
            "format": FORMAT_VERSION,
            "sources": _identities(self.source),
            **{own.key.removeprefix("data."): _identities(own) for own in self.own.values()},
            **{name: value for name, value in settings.items() if value is not None},
            "tokenizer": self._tokenizer_identity(),
            "split": list(self.split),
            "fraction": self.fraction,
            "seed": self.seed,
        }

    def _tokenizer_identity(self) -> dict[str, object]:
        if self.tokenizer in KINDS:
            size = {"vocab_size": self.vocab_size} if self.tokenizer == "bpe" else {}
            return {"kind": self.tokenizer, **size}
        eos = {} if self.eos_token is None else {"eos_token": self.eos_token}
        path = tokenizer_path(self.tokenizer)
        known = path or cached_tokenizer(self.tokenizer)
        prefix = stored_prefix(str(known), tokenizer_sha256(known)) if known else []
        template = template_in(known) if known and known.is_dir() else None
        more = {
            **eos,
            **({"prefix": prefix} if prefix else {}),
            **({"chat_template": sha256(template.encode()).hexdigest()} if template else {}),
        }
        if path is None:
            return {"kind": "hub", "id": self.tokenizer, **more}
        return {"kind": "folder", "sha256": tokenizer_sha256(path), **more}

    @property
    def data_dir(self) -> Path:
        """The folder of the prepared data, named by a readable label and a hash of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        files = self.source.files
        label = PurePosixPath(files[0].path).name.partition(".")[0] if files else BUILTIN
        label = unicodedata.normalize("NFC", label)
        label = re.sub(r"[^\w-]+", "-", label).strip("-")[:40] or "text"
        return self.root / f"{label}-{sha256(text.encode()).hexdigest()[:12]}"


def make_request(config: Config) -> Request:
    """Find the sources of a config. Raises UserError for one that is missing or unreadable."""
    data = config.data
    problems = []
    found: dict[str, Source] = {}
    own_text = {_KEYS[VAL]: data.val_source, _KEYS[TEST]: data.test_source}
    for key, names in {"data.source": data.source, **own_text}.items():
        try:
            if names is not None:
                found[key] = _find(names, key, data.encoding)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    own = {label: found[key] for label, key in _KEYS.items() if key in found}
    source, warnings = _hold_out(found["data.source"], own)
    return _request(config, source, own, data.split, data.fraction, warnings)


def whole_request(config: Config, source: str | Sequence[str], *, key: str) -> Request:
    """Find a text that is not split: all of it is the split `test`. `key` is for messages.

    Raises UserError as `make_request` does.
    """
    text = _find(source, key, config.data.encoding)
    return _request(config, text, {}, (1.0,), 1.0, ())


def _find(source: str | Sequence[str], key: str, encoding: str | None) -> Source:
    is_builtin = source in (BUILTIN, [BUILTIN])
    files = [] if is_builtin else find_files(source, key=key, encoding=encoding)
    if files and not any(file.size for file in files):
        raise UserError(f"{key} is empty")
    return Source(key, tuple(files))


def _hold_out(source: Source, own: Mapping[int, Source]) -> tuple[Source, list[str]]:
    """Remove the files of `own` (by label) from `source`; return it, and warnings.

    Raises UserError if nothing is left, or validation and test share a file.
    """
    if not source.files and any(not text.files for text in own.values()):
        raise UserError(f"{source.key} is builtin, and so is validation or test text")
    held = _by_place(own.values())
    taken = {file: held[place] for file in source.files if held and (place := file.place) in held}
    warnings = []
    if taken:
        keys = " and ".join(sorted(set(taken.values())))
        if len(taken) == len(source.files):
            raise UserError(
                f"{source.key}: all of its files are also in {keys}, so nothing is left"
            )
        warnings.append(f"{_listed(list(taken))}: in both {source.key} and {keys}; not trained on")
        source = replace(source, files=tuple(f for f in source.files if f not in taken))
    return source, warnings + _look_alikes(source, own)


def _by_place(sources: Iterable[Source]) -> dict[str, str]:
    """The key that each file belongs to, by the file's place."""
    held: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            other = held.setdefault(file.place, source.key)
            if other != source.key:
                raise UserError(
                    f"{source.key}: {file.name} is also in {other}; keep it in only one"
                )
    return held


def _look_alikes(source: Source, own: Mapping[int, Source]) -> list[str]:
    """Warnings about files named like validation or test text among other files."""
    warnings = []
    for label, names in _NAMES.items():
        alike = [f for f in source.files if names.match(PurePosixPath(f.path).name.lower())]
        if label not in own and 0 < len(alike) < len(source.files):
            kind = LONG_NAMES[SPLITS[label]]
            warnings.append(
                f"{_listed(alike)}: named like {kind} text, but {source.key} is split and most "
                f"of it is trained on; {_KEYS[label]}={alike[0].name} reserves it for {kind}"
            )
    return warnings


def _listed(files: Sequence[SourceFile]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return files[0].name + more


def _request(
    config: Config,
    source: Source,
    own: dict[int, Source],
    split: tuple[float, ...],
    fraction: float,
    warnings: Sequence[str],
) -> Request:
    data, tokenizer = config.data, tokenizer_name(config)
    if tokenizer in KINDS and data.eos_token not in (None, END_OF_TEXT):
        raise UserError(
            f"data.eos_token={data.eos_token!r}: a tokenizer made here ({tokenizer}) ends texts "
            f"with {END_OF_TEXT!r}; leave it out"
        )
    return Request(
        source=source,
        own=own,
        reading=Reading(data.text_column, data.separator, tokenizer, data.eos_token),
        tokenizer=tokenizer,
        vocab_size=data.vocab_size,
        split=split,
        fraction=fraction,
        seed=config.seed if data.seed is None else data.seed,
        root=storage_folder(config.storage_path) / PREPARED,
        eos_token=data.eos_token,
        warnings=tuple(warnings),
    )


def tokenizer_name(config: Config) -> str:
    """bpe, char, a path or a hub id: data.tokenizer, else model.init_from, else bpe."""
    return config.data.tokenizer or config.model.init_from or "bpe"


def _identities(source: Source) -> list[list[str | int]] | str:
    files = source.files
    if not files:
        return builtin_version()
    local = all(file.uri is None for file in files)
    if local and sum(file.size for file in files) <= _HASHED_BYTES:
        return [[PurePosixPath(f.path).suffix, f.size, file_sha256(f)] for f in files]
    return [[f.name, f.size, f.modified] for f in files]
