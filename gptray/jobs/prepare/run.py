"""Prepare a corpus on Ray Data: scan, split, train the tokenizer, write token shards.

Units of work stream through Ray Data two or three times; only counts, and the tokenizer's sample,
come back. The result does not depend on the number of tasks. Reading, splitting and writing are
`gptray.data`'s; here is what runs where.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptray.config import Config, RunFailed, UserError
from gptray.data.corpus import first_look
from gptray.data.difference import Lost
from gptray.data.fallback import fallback_warning, token_words
from gptray.data.plan import PiecePlan, SplitPlan
from gptray.data.publish import building
from gptray.data.request import Request, make_request, tokenizer_name
from gptray.data.shards import Shard, shard_dtype
from gptray.data.shares import split_rows
from gptray.data.sources import BUILTIN, Source, SourceFile
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.data.tokenizer_files import KINDS, hub_tokenizer, opens_at_once, tokenizer_path
from gptray.data.tokens import FORMAT_VERSION, MANIFEST, DamagedData, TokenData
from gptray.data.work import UnitScan, sample, tokenise
from gptray.files import storing
from gptray.hub import NotOnHub
from gptray.jobs.cluster import ray_cluster
from gptray.jobs.models import TOKENIZER, unknown
from gptray.jobs.prepare.scanning import find_pieces, scan_and_plan, text_warnings
from gptray.jobs.storage import check_storage
from gptray.jobs.stream import stream

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20  # of text per task
SAMPLE_BYTES = 32 << 20  # of training text that a tokenizer is trained on
_SAID_BYTES = 1 << 30  # of tokens: verifying more takes long enough to announce
_LOOKED_BYTES = 8 << 20  # of CSV that is read to its end before Ray starts
_CHECKED_FILES = 100  # looked into before Ray starts; the scan looks into all

# How a config's text is found: `make_request`, or one for another text of it.
FindSources = Callable[[Config], Request]


def check_sources(config: Config, find: FindSources = make_request) -> None:
    """Raise UserError, without Ray, for what can be seen at once: files, columns, tokenizer.

    Logs what the user should know about the files.
    """
    problems, request = [], None
    try:
        request = find(config)
        for warning in request.warnings:
            _warn(warning)
        problems += _first_looks(request)
    except UserError as error:
        problems.append(str(error))
    try:
        tokenizer_at_once(config)
        _check_hub(tokenizer_name(config), request)
    except NotOnHub as error:
        key = TOKENIZER if config.data.tokenizer else "model.init_from"
        problems.append(str(unknown(config, tokenizer_name(config), error.reason, key=key)))
    except UserError as error:
        problems.append(str(error))
    try:
        check_storage(config)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _check_hub(name: str, request: Request | None) -> None:
    """Refuse a hub tokenizer that fails to download; None: the text is not known.

    Raises NotOnHub, UserError.
    """
    is_prepared = request is not None and request.data_dir.exists()
    if name not in KINDS and not is_prepared and tokenizer_path(name) is None:
        hub_tokenizer(name)


def _first_looks(request: Request) -> list[str]:
    problems, left = [], _LOOKED_BYTES
    files = [file for source, _ in request.sources for file in source.files]
    for file in files[:_CHECKED_FILES]:
        # A row too wide may come anywhere in a CSV file, and a small file is read in a moment.
        whole = file.format == "csv" and file.compression is None and file.size <= left
        left -= file.size if whole else 0
        try:
            first_look(file, request.reading, whole=whole)
        except UserError as error:
            problems.append(str(error))
    return problems


@lru_cache
def _warn(message: str) -> None:
    """Once a process: a sweep looks at its text for every trial that changes how it is read."""
    logger.warning("%s", message)


def tokenizer_at_once(config: Config) -> Tokenizer | None:
    """The config's tokenizer where it needs no text, no download and no transformers; else None."""
    name = tokenizer_name(config)
    path = None if name in KINDS else tokenizer_path(name)
    if path is None or not opens_at_once(path):
        return None
    return Tokenizer.load(name, eos_token=config.data.eos_token)


def known_tokenizer(config: Config) -> Tokenizer | None:
    """The config's tokenizer if it is there before the text is prepared, or the text is already."""
    data = prepared(config)
    return data.tokenizer if data else tokenizer_at_once(config)


def prepared(config: Config, find: FindSources = make_request) -> TokenData | None:
    """The prepared data of a config; None if there is none, or its files have wrong sizes."""
    return _whole(find(config).data_dir)


def _whole(folder: Path, *, verify: bool = False) -> TokenData | None:
    """The data in a folder, or None; damage is logged. verify: check every byte."""
    if not os.path.lexists(folder):
        return None
    try:
        data = TokenData.open(folder)
        if verify:
            if data.num_bytes > _SAID_BYTES:
                logger.info("verifying %.1f GB of prepared data", data.num_bytes / 1e9)
            data.verify()
        return data
    except DamagedData as error:
        logger.warning("prepared data is damaged and will be built again: %s", error)
        return None


def prepare(
    config: Config, find: FindSources = make_request, *, piece_bytes: int = PIECE_BYTES
) -> TokenData:
    """Return the prepared data of a config; build it, on Ray, when there is none.

    A task reads about `piece_bytes` of text; the size decides where shards end, never what they
    hold. Data prepared before is verified byte by byte. Raises UserError for a source or tokenizer
    that cannot be read, naming file and line.
    """
    request = find(config)
    data = _whole(request.data_dir, verify=True) or _prepare(request, piece_bytes=piece_bytes)
    tell_losses(data)
    return data


def tell_losses(data: TokenData) -> None:
    """Say what the tokenizer loses of the text, if it loses anything."""
    if data.loses:
        logger.warning("%s; losses and bits per byte pay 8 bits for each lost byte", data.loses)


def _prepare(request: Request, *, piece_bytes: int) -> TokenData:
    tokenizer = None
    if request.tokenizer not in KINDS:
        tokenizer = Tokenizer.load(request.tokenizer, eos_token=request.eos_token)
    with building(request.data_dir) as folder, ray_cluster():
        _build(request, tokenizer, folder, piece_bytes=piece_bytes)
    return TokenData.open(request.data_dir)


def _build(
    request: Request, tokenizer: Tokenizer | None, folder: Path, *, piece_bytes: int
) -> None:
    """Fill `folder` with the tokenizer, the shards and, last, the manifest."""
    began = time.monotonic()
    texts = find_pieces(request, tokenizer, folder, piece_bytes=piece_bytes)
    files = [file for source, _ in texts for file in source.files]
    logger.info("preparing %s: %d files, %.1f MB", request.data_dir.name, len(files), _mb(files))
    plan, scans = scan_and_plan(request, texts)
    if tokenizer is None:
        tokenizer = _make_tokenizer(request, plan, scans)
    with storing(request.data_dir):
        tokenizer.save(folder / "tokenizer")

    def write_shards(number: int, unit: Sequence[PiecePlan]) -> dict[int, Shard]:
        with storing(request.data_dir):
            return tokenise(unit, folder=folder, number=number)

    shards = stream(plan.units, write_shards, doing="tokenising")
    for file in files:
        if file.changed():
            raise RunFailed(f"{file.name} changed while it was being prepared; start again")
    splits = _number_shards(folder, request.split_names, plan, shards)
    manifest: dict[str, Any] = {
        **_provenance(request, [source for source, _ in texts], plan, scans),
        "tokenizer": _describe(request, tokenizer, shards),
        "dtype": shard_dtype(tokenizer.vocab_size),
        "splits": splits,
        "warnings": text_warnings(request, plan, scans, splits),
    }
    asked = request.vocab_size if request.tokenizer == "bpe" else None
    if warning := fallback_warning(manifest, asked=asked):
        logger.warning("%s", warning)
        manifest["warnings"].append(warning)
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    with storing(request.data_dir):
        (folder / f"{BUILTIN}.jsonl").unlink(missing_ok=True)
        (folder / MANIFEST).write_text(text + "\n", "utf-8")
    logger.info("prepared %s in %.1f s", request.data_dir, time.monotonic() - began)
    for name, words in split_rows(manifest):
        logger.info("%-5s  %s", name, words)
    logger.info("tokens  %s", token_words(manifest))


def _make_tokenizer(request: Request, plan: SplitPlan, scans: Sequence[UnitScan]) -> Tokenizer:
    if request.tokenizer == "char":
        # Of the whole text: a character that only validation has must have a token too.
        return char_tokenizer(c for unit in scans for piece in unit.pieces for c in piece.alphabet)
    share = SAMPLE_BYTES / max(plan.train_bytes, 1)
    seed = request.seed
    texts = stream(
        plan.units,
        lambda number, unit: sample(unit, share=share, seed=seed, number=number),
        doing="sampling",
    )
    return train_bpe((text for unit in texts for text in unit), request.vocab_size)


def _provenance(
    request: Request, sources: Sequence[Source], plan: SplitPlan, scans: Sequence[UnitScan]
) -> dict[str, Any]:
    """Where the tokens come from: sources, split and counts."""
    sha256 = {name: digest for unit in scans for name, digest in unit.sha256.items()}
    named = {file for source, _ in request.sources for file in source.files}
    files = {
        source.key.removeprefix("data."): [
            {
                "path": file.name if file in named else BUILTIN,
                "size": file.size,
                "sha256": sha256[file.name],
            }
            for file in source.files
        ]
        for source in sources
    }
    return {
        "format": FORMAT_VERSION,
        "request": request.identity,
        "sources": files.pop(sources[0].key.removeprefix("data.")),
        **files,
        "split": {
            "fractions": list(request.split),
            "cut_documents": plan.cut_documents,
            "seed": request.seed,
        },
        "fraction": request.fraction,
        "documents": plan.total_documents,
        "bytes": plan.total_bytes,
        "empty_rows": sum(piece.empty_rows for unit in scans for piece in unit.pieces),
    }


def _describe(
    request: Request, tokenizer: Tokenizer, units: Sequence[dict[int, Shard]]
) -> dict[str, Any]:
    """The tokenizer, and what it loses of the text."""
    lost = Lost.joined(shard.lost for unit in units for shard in unit.values())
    return {
        "source": request.tokenizer,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_id,
        "lost": lost.entry(),
    }


def _number_shards(
    folder: Path, names: Sequence[str], plan: SplitPlan, units: Sequence[dict[int, Shard]]
) -> dict[str, Any]:
    """Give the tasks' files their final names, in corpus order, and list them by split."""
    splits = {}
    for label, documents in enumerate(plan.documents):
        entries: list[dict[str, Any]] = []
        for shard in (unit[label] for unit in units if label in unit):
            name = f"{names[label]}-{len(entries):05d}.bin"
            (folder / shard.file).rename(folder / name)
            entries.append(shard.entry(name))
        splits[names[label]] = {
            "documents": documents,
            "tokens": sum(entry["tokens"] for entry in entries),
            "bytes": sum(entry["bytes"] for entry in entries),
            "lost_bytes": sum(entry["lost_bytes"] for entry in entries),
            "characters": sum(entry["characters"] for entry in entries),
            "fallback_tokens": sum(entry["fallback_tokens"] for entry in entries),
            "shards": entries,
        }
    return splits


def _mb(files: Sequence[SourceFile]) -> float:
    return sum(file.size for file in files) / 1e6
