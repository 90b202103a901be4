"""Texts that are easy to damage: several scripts, emoji, odd white space and line ends."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

KOREAN = "\ub098\ub78f\ub9d0\uc2f8\ubbf8 \ub4d5\uadc1\uc5d0 \ub2ec\uc544\u3002\n\u11a8\u1100"
EMOJI = (
    "a\U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1f0\U0001f1f7!  tab\t\u00e9e\u0301 z"
)
ENGLISH = (
    "The cat's hat \u2014 it isn't, I'll say, 1234567 of them.\r\n\r\n  Two  spaces \n\n\n end"
)
CHINESE = "\u5929\u5730\u7384\u9ec3\u3002\n\u5b87\u5b99\u6d2a\u8352\u3002\n\n\u65e5\u6708"
SPECIAL = "plain <|endoftext|> text, <s> and </s>"
DOCUMENTS = [KOREAN, EMOJI, ENGLISH, CHINESE, SPECIAL, "x", "\n\nlead", "trail \n", "9 lives\t"]


def many_documents(count: int) -> list[str]:
    """Documents of different lengths, each one unlike the others."""
    return [
        f"Document {n} {DOCUMENTS[n % len(DOCUMENTS)]} " + f"word{n} and more " * (n % 7)
        for n in range(count)
    ]


def write_rows(path: Path, texts: Sequence[str], *, column: str = "text") -> Path:
    """Write one row per text in the format that the name asks for."""
    name = path.name.removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
    if name.endswith(".jsonl"):
        rows = [json.dumps({"id": n, column: text}, ensure_ascii=n % 2 == 0)
                for n, text in enumerate(texts)]  # fmt: skip
        content = "".join(row + "\n" for row in rows).encode()
    elif name.endswith(".csv"):
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        rows = [f"{n},{text}" for n, text in enumerate(quoted)]
        content = "\n".join([f"id,{column}", *rows, ""]).encode()
    elif name.endswith(".parquet"):
        parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
        return path
    else:
        content = "".join(texts).encode()
    return write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write bytes, compressed as the name asks."""
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    elif path.suffix == ".bz2":
        content = bz2.compress(content)
    path.write_bytes(content)
    return path
