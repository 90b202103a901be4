"""Prepared data on disk: a folder of token shards with a tokenizer and a manifest.

Opens, checks and reads it by memory map; building it is `gptray.runners.prepare`'s.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptray.data.split import split_names
from gptray.data.tokenizer import Tokenizer
from gptray.files import sha256_of

MANIFEST = "manifest.json"
FORMAT_VERSION = 3


class DamagedData(ValueError):
    """A data folder that is not what its manifest says; it can be built again."""


class TokenSplit:
    """One split's tokens in order, documents one after the other, each closed by end of text."""

    def __init__(self, folder: Path, dtype: str, entry: dict[str, Any]) -> None:
        self.tokens: int = entry["tokens"]
        self.bytes: int = entry["bytes"]
        self.documents: int = entry["documents"]
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[dict[str, Any]] = entry["shards"]
        self._starts = list(accumulate((s["tokens"] for s in self._shards), initial=0))
        self._maps: dict[int, npt.NDArray[np.unsignedinteger[Any]]] = {}

    def __len__(self) -> int:
        return self.tokens

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens [start, stop), across shards; raises IndexError outside the split."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}:{stop} of a split of {self.tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        at = start
        shard = bisect_right(self._starts, start) - 1
        while at < stop:
            base = self._starts[shard]
            end = min(stop, self._starts[shard + 1])
            out[at - start : end - start] = self._map(shard)[at - base : end - base]
            at = end
            shard += 1
        return out

    def _map(self, shard: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        if shard not in self._maps:
            path = self._folder / self._shards[shard]["file"]
            self._maps[shard] = np.memmap(path, dtype=self._dtype, mode="r")
        return self._maps[shard]

    def check(self, *, content: bool) -> None:
        """Raise DamagedData unless every shard has its size (and, with `content`, its sha256)."""
        for entry in self._shards:
            path = self._folder / entry["file"]
            size = entry["tokens"] * self._dtype.itemsize
            if not path.is_file():
                raise DamagedData(f"{path} is missing")
            if path.stat().st_size != size:
                raise DamagedData(f"{path} has {path.stat().st_size} bytes, not {size}")
            if content and sha256_of(path) != entry["sha256"]:
                raise DamagedData(f"{path} has changed (sha256)")


class TokenData:
    """A prepared data folder: its splits, its tokenizer and its manifest."""

    def __init__(self, data_dir: Path, manifest: dict[str, Any]) -> None:
        self.data_dir = data_dir
        self.manifest = manifest
        self.splits = {
            name: TokenSplit(data_dir, manifest["dtype"], manifest["splits"][name])
            for name in split_names(len(manifest["splits"]))
        }
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_token_id"]

    @classmethod
    def open(cls, data_dir: str | Path) -> TokenData:
        """Open a folder; raises DamagedData unless it is whole (file sizes; see `verify`)."""
        folder = Path(data_dir)
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            if manifest["format"] != FORMAT_VERSION:
                raise DamagedData(f"{folder} has format {manifest['format']}, not {FORMAT_VERSION}")
            data = cls(folder, manifest)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DamagedData(f"{folder / MANIFEST} cannot be read: {error!r}") from None
        data._check(content=False)
        return data

    @property
    def train(self) -> TokenSplit:
        return self.splits["train"]

    @property
    def val(self) -> TokenSplit:
        return self.splits["val"]

    @property
    def test(self) -> TokenSplit | None:
        """The only split of a text that was prepared as a whole."""
        return self.splits.get("test")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when first asked for."""
        return Tokenizer.load(self.data_dir / "tokenizer")

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the tokens: of the tokenizer and of every shard, wherever the folder is."""
        shards = [s["sha256"] for e in self.manifest["splits"].values() for s in e["shards"]]
        text = " ".join([self.manifest["tokenizer"]["sha256"], *shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self) -> None:
        """Read everything; raises DamagedData for the first file that is not as it was written."""
        self._check(content=True)

    def _check(self, *, content: bool) -> None:
        path = self.data_dir / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise DamagedData(f"{path} is missing")
        if content and sha256_of(path) != self.manifest["tokenizer"]["sha256"]:
            raise DamagedData(f"{path} has changed (sha256)")
        for split in self.splits.values():
            split.check(content=content)
