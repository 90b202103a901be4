"""Prepared data without Ray: one shard for each split, written as a task writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptray.data.chat_template import ChatTemplate
from gptray.data.data_manifest import SplitEntry
from gptray.data.difference import Lost
from gptray.data.documents import Part
from gptray.data.shards import ShardEncoder, ShardWriter, shard_dtype, split_entry
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import FORMAT_VERSION, TokenData
from gptray.jobs.prepare.origins import template_entry
from gptray.storage.template_file import TEMPLATE


def prepared_here(folder: Path, tokenizer: Tokenizer, *, train: str, val: str) -> TokenData:
    """Each split is one document."""
    return _prepared(folder, tokenizer, {"train": [Part(train, True)], "val": [Part(val, True)]})


def whole_here(folder: Path, tokenizer: Tokenizer, text: str) -> TokenData:
    """A text that is not split, one document."""
    return _prepared(folder, tokenizer, {"test": [Part(text, True)]})


def chats_here(folder: Path, tokenizer: Path, chats: Sequence[list[dict[str, Any]]]) -> TokenData:
    """Chats as the template in the tokenizer's folder writes them, the same in both splits."""
    template = ChatTemplate.of(str(tokenizer), eos_token=None)
    assert template
    texts = [template.write(chat, add_generation_prompt=False) for chat in chats]
    parts = [Part(text, ends=True, is_chat=True) for text in texts]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / TEMPLATE).write_text(template.source, "utf-8")
    return _prepared(folder, template.tokenizer, {"train": parts, "val": parts})


def _prepared(
    folder: Path, tokenizer: Tokenizer, documents: Mapping[str, Sequence[Part]]
) -> TokenData:
    tokenizer.save(folder / "tokenizer")
    encoder, parts = ShardEncoder(tokenizer), []
    splits: dict[str, SplitEntry] = {}
    for name, texts in documents.items():
        with ShardWriter(folder / f"{name}-00000.bin", encoder) as writer:
            for text in texts:
                writer.add(text.text, begins=True, ends=True, is_chat=text.is_chat)
        assert writer.shard
        parts.append(writer.shard.lost)
        splits[name] = split_entry(len(texts), [writer.shard.entry])
    chats = sum(text.is_chat for texts in documents.values() for text in texts)
    manifest = {
        "format": FORMAT_VERSION,
        "documents": sum(map(len, documents.values())),
        "chats": chats,
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
            **template_entry(folder / "tokenizer", has_chats=chats > 0),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenData.open(folder)
