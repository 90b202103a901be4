"""Prepared data on disk: a folder of token shards with a tokenizer and a manifest.

Opens, checks and memory-maps it; `gptray.jobs.prepare.run` builds it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from gptray.data.data_manifest import DataManifest, SplitEntry
from gptray.data.difference import loses
from gptray.data.split import split_names
from gptray.data.tokenizer import Tokenizer
from gptray.storage.files import sha256_of
from gptray.storage.stored import read_object
from gptray.storage.template_file import TEMPLATE

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
_READERS = 4  # threads that verify shards

_Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class DamagedData(ValueError):
    """A data folder that differs from its manifest; it can be built again."""


class TokenSplit:
    """One split's tokens: its documents one after the other, each ended by the end-of-text token.

    document_prefix: the special tokens that begin each document, such as <s>; text has none.
    ends_turns: whether the end of text also ends each turn, so that nothing tells chats apart.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        entry: SplitEntry,
        document_prefix: Sequence[int] = (),
        *,
        ends_turns: bool = False,
    ) -> None:
        self.tokens = entry["tokens"]
        self.bytes = entry["bytes"]
        self.documents = entry["documents"]
        # UTF-8 bytes that decoding does not restore.
        self.lost_bytes = entry["lost_bytes"]
        self.document_prefix = list(document_prefix)
        self.ends_turns = ends_turns
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards = entry["shards"]
        self._starts = list(accumulate((s["tokens"] for s in self._shards), initial=0))
        self._maps: dict[int, _Ids] = {}

    @property
    def lost(self) -> float:
        """Share of the text that decoding does not restore."""
        return self.lost_bytes / self.bytes if self.bytes else 0.0

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
            if end > at:  # an empty file cannot be mapped
                out[at - start : end - start] = self._map(shard)[at - base : end - base]
            at = end
            shard += 1
        return out

    def counts(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each target counts in a loss: all do but those of `document_prefix`."""
        return ~np.isin(targets, self.document_prefix)

    def _map(self, shard: int) -> _Ids:
        if shard not in self._maps:
            path = self._folder / self._shards[shard]["file"]
            self._maps[shard] = np.memmap(path, dtype=self._dtype, mode="r")
        return self._maps[shard]

    @property
    def sha256(self) -> dict[Path, str]:
        """Each shard's sha256 when it was written."""
        return {self._folder / entry["file"]: entry["sha256"] for entry in self._shards}

    def check(self) -> None:
        """Raise DamagedData unless every shard exists with the right size."""
        if self.tokens != self._starts[-1]:
            raise DamagedData(f"{self._folder / MANIFEST}: shards do not add up to {self.tokens:,}")
        for entry in self._shards:
            path = self._folder / entry["file"]
            size = entry["tokens"] * self._dtype.itemsize
            if not path.is_file():
                raise DamagedData(f"{path} is missing")
            if path.stat().st_size != size:
                raise DamagedData(f"{path} has {path.stat().st_size} bytes, not {size}")


class TokenData:
    """A prepared data folder: its splits, its tokenizer and its manifest.

    also: other texts that are scored, by name, each prepared as a whole with the same tokenizer.
    """

    def __init__(self, data_dir: Path, manifest: DataManifest) -> None:
        self.data_dir = data_dir
        self.manifest = manifest
        self.also: dict[str, TokenData] = {}
        self.vocab_size = manifest["tokenizer"]["vocab_size"]
        self.eos_id = manifest["tokenizer"]["eos_token_id"]
        ends_turns = manifest["tokenizer"].get("end_of_turn_id") == self.eos_id
        self.splits = {
            name: TokenSplit(
                data_dir,
                manifest["dtype"],
                manifest["splits"][name],
                manifest["tokenizer"].get("document_prefix", ()),
                ends_turns=ends_turns and self.is_of_chats,
            )
            for name in split_names(len(manifest["splits"]))
        }

    @classmethod
    def open(cls, data_dir: str | Path, *, also: Mapping[str, Path] | None = None) -> TokenData:
        """Open a folder, and those of other texts by name.

        Raises DamagedData unless their file sizes are right (see `verify`).
        """
        folder = Path(data_dir)
        try:
            manifest = cast(DataManifest, read_object(folder / MANIFEST, most=None))
            if manifest["format"] != FORMAT_VERSION:
                raise DamagedData(f"{folder} has format {manifest['format']}, not {FORMAT_VERSION}")
            data = cls(folder, manifest)
            data.also = {name: cls.open(one) for name, one in (also or {}).items()}
            data._check()
        except DamagedData:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedData(f"{folder / MANIFEST} cannot be read: {error!r}") from None
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

    @property
    def scored(self) -> dict[str, TokenSplit]:
        """Everything that an evaluation can score: the splits, and the other texts as also/NAME."""
        others = {f"also/{name}": one.splits["test"] for name, one in self.also.items()}
        return {**self.splits, **others}

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end what a model writes: the end of text and, in chats, of a turn."""
        end = self.manifest["tokenizer"].get("end_of_turn_id", self.eos_id)
        return list(dict.fromkeys([self.eos_id, end]))

    @property
    def is_of_chats(self) -> bool:
        """Whether most documents are chats that the chat template wrote."""
        return 2 * self.manifest.get("chats", 0) > self.manifest.get("documents", 0)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data's tokenizer, loaded on first use."""
        return Tokenizer.load(self.data_dir / "tokenizer")

    @cached_property
    def loses(self) -> str:
        """What the tokenizer loses of the text, in words; "" if it loses nothing."""
        num_bytes = sum(split.bytes for split in self.splits.values())
        return loses(self.manifest["tokenizer"]["lost"], num_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the tokens: a hash of tokenizer and shards, wherever the folder is."""
        shards = [s["sha256"] for e in self.manifest["splits"].values() for s in e["shards"]]
        text = " ".join([self.manifest["tokenizer"]["sha256"], *shards])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(path.stat().st_size for split in self.splits.values() for path in split.sha256)

    def verify(self) -> None:
        """Read everything; raises DamagedData for the first file that has changed."""
        self._check()
        tokenizer = self.manifest["tokenizer"]
        expected = {self._tokenizer_json: tokenizer["sha256"]}
        if "chat_template" in tokenizer:
            expected[self._tokenizer_json.with_name(TEMPLATE)] = tokenizer["chat_template"]
        for split in self.splits.values():
            expected |= split.sha256
        # hashlib releases the GIL.
        with ThreadPoolExecutor(_READERS) as readers:
            for path, found in zip(expected, readers.map(sha256_of, expected), strict=True):
                if found != expected[path]:
                    raise DamagedData(f"{path} has changed (sha256)")

    @property
    def _tokenizer_json(self) -> Path:
        return self.data_dir / "tokenizer" / "tokenizer.json"

    def _check(self) -> None:
        if not self._tokenizer_json.is_file():
            raise DamagedData(f"{self._tokenizer_json} is missing")
        for split in self.splits.values():
            split.check()
