"""Token splits made by hand: documents of token ids, each closed by end of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptray.data.data_manifest import ShardEntry, SplitEntry
from gptray.data.tokens import TokenSplit


def split_of(
    folder: Path,
    tokens: list[int],
    *,
    num_bytes: int = 1000,
    lost_bytes: int = 0,
    shards: int = 2,
    document_prefix: Sequence[int] = (),
) -> TokenSplit:
    """A split of these tokens, in files as preparation writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    for number, part in enumerate(np.array_split(np.array(tokens, "<u2"), shards)):
        file = f"{number}.bin"
        (folder / file).write_bytes(part.tobytes())
        entries.append(
            {"file": file, "tokens": len(part), "bytes": 0, "lost_bytes": 0, "sha256": ""}
        )
    entry: SplitEntry = {
        "tokens": len(tokens),
        "bytes": num_bytes,
        "lost_bytes": lost_bytes,
        "documents": 1,
        "shards": entries,
    }
    return TokenSplit(folder, "uint16", entry, document_prefix)
