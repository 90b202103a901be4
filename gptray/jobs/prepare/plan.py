"""The prepare job alone: what it would do, and what there is afterwards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gptray.commands import retyped
from gptray.config import Config, override
from gptray.data.fallback import token_measures, token_words
from gptray.data.request import make_request
from gptray.data.shares import split_rows
from gptray.data.sources import BUILTIN, SourceFile
from gptray.data.tokens import TokenData
from gptray.jobs.models import locate, with_tokenizer
from gptray.jobs.next_steps import differing, tell
from gptray.jobs.prepare.run import check_sources, prepare, prepared
from gptray.wording import count


def prepare_and_count(config: Config) -> dict[str, Any]:
    """Prepare a config's text; what there is afterwards, and how fast it came to be.

    `mb_per_sec` counts the text's bytes over the whole job; null when nothing had to be built.
    """
    began = time.monotonic()
    config = _located(config)
    check_sources(config)
    is_ready = prepared(config) is not None
    data = prepare(config)
    seconds = time.monotonic() - began
    splits = data.manifest["splits"]
    again = retyped("train")
    if again:
        tell([again], settings=differing(config))
    return {
        "data_dir": str(data.data_dir),
        "documents": data.manifest["documents"],
        "tokens": {name: entry["tokens"] for name, entry in splits.items()},
        "bytes": {name: entry["bytes"] for name, entry in splits.items()},
        "split_documents": {name: entry["documents"] for name, entry in splits.items()},
        "vocab_size": data.vocab_size,
        "lost": {name: round(split.lost, 6) for name, split in data.splits.items()},
        **{key: round(value, 4) for key, value in token_measures(data.manifest).items()},
        "empty_rows": data.manifest["empty_rows"],
        "warnings": data.manifest["warnings"],
        "built": not is_ready,
        "seconds": round(seconds, 2),
        "mb_per_sec": None if is_ready else round(data.manifest["bytes"] / 1e6 / seconds, 3),
    }


def preparation_plan(config: Config) -> list[tuple[str, str]]:
    """What the prepare job would do, without Ray; raises UserError as the job would."""
    config = _located(config)
    check_sources(config)
    request, data = make_request(config), prepared(config)
    names = dict(enumerate(request.split_names))
    rows = []
    for source, shares in request.sources:
        parts = ", ".join(f"{names[label]} {share:.1%}" for label, share in shares.items())
        rows.append((source.key.removeprefix("data."), f"{_size(source.files)}: {parts}"))
    rows += [
        ("tokenizer", request.tokenizer),
        ("data_dir", str(request.data_dir)),
        ("to do", "nothing, it is prepared" if data else "scan, tokenise, write"),
    ]
    return rows + (text_rows(data) if data else [])


def _located(config: Config) -> Config:
    """The config with the folder of the run that it takes the tokenizer from. Raises UserError."""
    config, init_from = with_tokenizer(config), config.model.init_from
    if init_from is None or config.data.tokenizer:
        return config
    return override(config, {"model.init_from": locate(config, init_from, key="model.init_from")})


def text_rows(data: TokenData) -> list[tuple[str, str]]:
    """What a plan says of text that is prepared: its shares, what is odd, what the tokenizer loses.

    Labels differ, since a plan is also told as an object.
    """
    rows = split_rows(data.manifest)
    if words := token_words(data.manifest):
        rows.append(("tokens", words))
    if data.manifest["warnings"]:
        rows.append(("warnings", "; ".join(data.manifest["warnings"])))
    return rows + ([("lost", data.loses)] if data.loses else [])


def _size(files: Sequence[SourceFile]) -> str:
    megabytes = sum(file.size for file in files) / 1e6
    return f"{count(len(files), 'file')}, {megabytes:.1f} MB" if files else BUILTIN
