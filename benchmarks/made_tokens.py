"""Makes prepared data for benchmarks, without Ray: random ids, or text."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tiny import tiny_text

from gptray.data.builtin import builtin_documents
from gptray.data.data_manifest import ShardEntry
from gptray.data.difference import Lost
from gptray.data.shards import ShardEncoder, ShardWriter, shard_dtype
from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.data.tokenizer_files import END_OF_TEXT
from gptray.data.tokens import FORMAT_VERSION, MANIFEST, TokenData


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of made-up words that every library can open; the end of text is the last id."""
    import tokenizers
    from tokenizers import models

    vocab = {f"w{i}": i for i in range(vocab_size - 1)} | {END_OF_TEXT: vocab_size - 1}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "unk_token": "w0"}
    return Tokenizer(backend, names)


def random_tokens(folder: Path, vocab_size: int, *, tokens: int = 2_000_000) -> TokenData:
    """Uniformly random ids, for timing a training step."""
    tokenizer = word_tokenizer(vocab_size)
    dtype = np.dtype(shard_dtype(vocab_size)).newbyteorder("<")
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, ShardEntry] = {}
    for name, count in (("train", tokens), ("val", tokens // 10)):
        shard = rng.integers(vocab_size, size=count).astype(dtype).tobytes()
        file = f"{name}-00000.bin"
        (folder / file).write_bytes(shard)
        digest = hashlib.sha256(shard).hexdigest()
        entries[name] = {"file": file, "tokens": count, "bytes": 4 * count, "lost_bytes": 0,
                         "sha256": digest}  # fmt: skip
    return _data(folder, tokenizer, entries)


def text_tokens(folder: Path, *, sentences: int = 4000) -> TokenData:
    """The sentences of `tiny_text`, which can be learnt, with a tenth for validation."""
    lines = tiny_text(sentences).splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    tokenizer = train_bpe(lines[:cut], 300)
    return split_tokens(folder, tokenizer, train="".join(lines[:cut]), val="".join(lines[cut:]))


def whole_text(name: str) -> str:
    """A file's text (of a .csv, the first two columns) or, for "builtin", Python's documentation.

    Rows and documents are shuffled, in the same way in every call.
    """
    if name == "builtin":
        documents = builtin_documents()
        random.Random(0).shuffle(documents)
        return "\n\n".join(documents)
    if not name.endswith(".csv"):
        return Path(name).read_text(encoding="utf-8")
    with open(name, encoding="utf-8", newline="") as file:
        rows = [f"{row[0]}\n{row[1]}\n\n" for row in list(csv.reader(file))[1:]]
    random.Random(0).shuffle(rows)
    return "".join(rows)


def split_tokens(folder: Path, tokenizer: Tokenizer, **splits: str) -> TokenData:
    """Tokenize each split, such as train and val, as one document; an unsplit text is `test`."""
    encoder, entries = ShardEncoder(tokenizer), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in splits.items():
        file = f"{name}-00000.bin"
        with ShardWriter(folder / file, encoder) as writer:
            writer.add(text, begins=True, ends=True)
        assert writer.shard
        entries[name] = writer.shard.entry
    return _data(folder, tokenizer, entries)


def _data(folder: Path, tokenizer: Tokenizer, entries: Mapping[str, ShardEntry]) -> TokenData:
    """Add the tokenizer and a manifest with one shard and one document per split."""
    tokenizer.save(folder / "tokenizer")
    manifest = {
        "format": FORMAT_VERSION,
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "warnings": [],
        "dtype": shard_dtype(tokenizer.vocab_size),
        "splits": {
            name: {
                "documents": 1,
                "shards": [entry],
                "tokens": entry["tokens"],
                "bytes": entry["bytes"],
                "lost_bytes": entry["lost_bytes"],
            }
            for name, entry in entries.items()
        },
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_id,
            "document_prefix": tokenizer.document_prefix,
            "lost": Lost().entry(),
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return TokenData.open(folder)
