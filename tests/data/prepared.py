"""Prepared data without Ray: one shard for each split, written as a task writes it."""

from __future__ import annotations

import json
from pathlib import Path

from gptray.data.data_manifest import SplitEntry
from gptray.data.difference import Lost
from gptray.data.shards import ShardEncoder, ShardWriter, shard_dtype, split_entry
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import FORMAT_VERSION, TokenData


def prepared_here(folder: Path, tokenizer: Tokenizer, *, train: str, val: str) -> TokenData:
    """Each split is one document."""
    return _prepared(folder, tokenizer, {"train": train, "val": val})


def whole_here(folder: Path, tokenizer: Tokenizer, text: str) -> TokenData:
    """A text that is not split, one document."""
    return _prepared(folder, tokenizer, {"test": text})


def _prepared(folder: Path, tokenizer: Tokenizer, texts: dict[str, str]) -> TokenData:
    tokenizer.save(folder / "tokenizer")
    encoder, parts = ShardEncoder(tokenizer), []
    splits: dict[str, SplitEntry] = {}
    for name, text in texts.items():
        with ShardWriter(folder / f"{name}-00000.bin", encoder) as writer:
            writer.add(text, begins=True, ends=True)
        assert writer.shard
        parts.append(writer.shard.lost)
        splits[name] = split_entry(1, [writer.shard.entry])
    manifest = {
        "format": FORMAT_VERSION,
        "bytes": sum(entry["bytes"] for entry in splits.values()),
        "warnings": [],
        "dtype": shard_dtype(tokenizer.vocab_size),
        "splits": splits,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_id,
            "document_prefix": tokenizer.document_prefix,
            "lost": Lost.joined(parts).entry(),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenData.open(folder)
