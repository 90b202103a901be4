"""Writes token shards: flat little-endian files of token ids.

Encodes in batches of about a quarter of a million characters, so that memory does not grow with
the text. Checks every text and counts what decoding its tokens does not restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptray.data.boundary import chunks, last_boundary
from gptray.data.data_manifest import ShardEntry, SplitEntry
from gptray.data.difference import Lost, Tally
from gptray.data.documents import Part
from gptray.data.fallback import fallback_tokens
from gptray.data.roundtrip import RoundTrip
from gptray.data.tokenizer import Tokenizer
from gptray.data.written_names import put_together

BATCH_CHARACTERS = 1 << 18
_REMEMBERED = 1 << 23  # characters of chunks


@dataclass(frozen=True)
class Shard:
    """One written file's manifest entry, and what its text loses."""

    entry: ShardEntry
    lost: Lost


def split_entry(documents: int, shards: list[ShardEntry]) -> SplitEntry:
    """The manifest entry of a split: its documents and the sums over its shards."""
    return {
        "documents": documents,
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "lost_bytes": sum(shard["lost_bytes"] for shard in shards),
        "characters": sum(shard["characters"] for shard in shards),
        "fallback_tokens": sum(shard["fallback_tokens"] for shard in shards),
        "shards": shards,
    }


def shard_dtype(vocab_size: int) -> str:
    """uint16 while every id fits, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardEncoder:
    """Encodes texts to the bytes of their token ids.

    If the tokenizer allows it, cuts a text into words and encodes each once: most words of a large
    text are repeats, so this is about twice as fast as encoding it whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = np.dtype(shard_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self.cuts = tokenizer.cuts_at_boundaries()
        self.start_of_text = self._pack(tokenizer.document_prefix)
        self._end_of_text = self._pack([tokenizer.eos_id])
        self._tokenizer = tokenizer
        self._is_fallback = fallback_tokens(tokenizer)
        self._round_trip = RoundTrip(tokenizer)
        self._checks_chunks = self.cuts and self._round_trip.adds_up
        self._known: dict[str, bytes] = {}
        self._lossy: dict[str, Lost] = {}
        self._remembered = 0

    def count_fallback(self, ids: bytes) -> int:
        """How many of a text's tokens are parts of characters or unknown."""
        return int(self._is_fallback[np.frombuffer(ids, self.dtype)].sum())

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as bytes of a shard."""
        if not self.cuts:
            return [self._pack(ids) for ids in self._tokenizer.encode_batch(texts)]
        parts = [chunks(text) for text in texts]
        if self._remembered > _REMEMBERED:
            self._known.clear()
            self._lossy.clear()
            self._remembered = 0
        new = list({chunk for part in parts for chunk in part} - self._known.keys())
        self._remembered += sum(map(len, new))
        for chunk, ids in zip(new, self._tokenizer.encode_batch(new), strict=True):
            self._known[chunk] = self._pack(ids)
            if self._checks_chunks and (lost := self._round_trip.lost(chunk, ids, begins=False)):
                self._lossy[chunk] = lost
        return [b"".join(map(self._known.__getitem__, part)) for part in parts]

    def encode_chat(self, chat: str) -> bytes:
        """The ids of a chat that a template wrote, as bytes of a shard."""
        return self._pack(self._tokenizer.chat_ids(chat))

    def end_of(self, part: Part) -> bytes:
        """The end-of-text token if a document ends with this part, unless the text has it."""
        has_own = part.is_chat and part.text.rstrip().endswith(self._tokenizer.eos_token)
        return self._end_of_text if part.ends and not has_own else b""

    def check(self, part: Part, encoded: bytes, tally: Tally) -> None:
        """Add the losses of a text that has just been encoded to the tally."""
        trip = self._round_trip
        if trip.is_lossless or (self._checks_chunks and not self._lossy and not part.is_chat):
            return
        if self._checks_chunks and not part.is_chat:
            for chunk in chunks(part.text):
                if chunk in self._lossy:
                    tally.lost.add(self._lossy[chunk])
            return
        ids = np.frombuffer(encoded, self.dtype).tolist()
        for text, its_ids in self._pieces(part.text, ids) if part.is_chat else [(part.text, ids)]:
            if (back := trip.back(text, its_ids)) is not None:
                tally.compare(text, back, trip.unknown)

    def _pieces(self, chat: str, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
        """The texts between a chat's special tokens, each with its ids."""
        for part in self._tokenizer.written_names.parts(chat):
            if isinstance(part, str):
                text = part
                continue
            stop = ids.index(part)
            yield put_together(text), ids[:stop]
            ids = ids[stop + 1 :]
        yield put_together(text), ids

    def _pack(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()


class ShardWriter:
    """Writes one shard of one split; a context manager. A shard without text leaves no file.

    A shard whose text the tokenizer lost entirely leaves an empty one.
    """

    def __init__(self, path: Path, encoder: ShardEncoder) -> None:
        self._path = path
        self._encoder = encoder
        self._open = ""  # text of the current document that is not batched yet
        self._begins = False  # whether the current document begins with that text
        self._batch: list[tuple[Part, bool]] = []  # with whether a document begins
        self._batched = 0  # characters
        self._digest = hashlib.sha256()
        self._tally = Tally()
        self._entry: ShardEntry = {
            "file": path.name, "tokens": 0, "bytes": 0, "lost_bytes": 0, "characters": 0,
            "fallback_tokens": 0, "sha256": "",
        }  # fmt: skip

    def __enter__(self) -> ShardWriter:
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._push(Part(self._open, False))
                self._flush()
        finally:
            self._stream.close()
        if self.shard is None:
            self._path.unlink()

    @property
    def shard(self) -> Shard | None:
        """The shard that was written; None if it has no text."""
        entry, lost = self._entry, self._tally.lost
        if not entry["tokens"] and not entry["bytes"]:
            return None
        entry["lost_bytes"] = min(lost.bytes, entry["bytes"])
        entry["sha256"] = self._digest.hexdigest()
        return Shard(entry, lost)

    def add(self, text: str, *, begins: bool, ends: bool, is_chat: bool = False) -> None:
        """Append a stretch of a document's text, and the tokens that begin and end a document.

        is_chat: a chat template wrote the text, its beginning included.
        """
        if is_chat:
            self._push(Part(text, ends, is_chat))
            return
        self._begins |= begins
        self._open += text
        if self._encoder.cuts:
            self._push_long_text()
        if ends:
            self._push(Part(self._open, True))
            self._open = ""

    def break_off(self) -> None:
        """End a document that continues in another split, so that no token spans both."""
        self._push(Part(self._open, False))
        self._open = ""

    def _push_long_text(self) -> None:
        start = 0
        while len(self._open) - start > BATCH_CHARACTERS:
            # Text without a boundary is cut at a fixed length, counted from the last boundary.
            window = self._open[start : start + BATCH_CHARACTERS + 1]
            cut = start + (last_boundary(window) or BATCH_CHARACTERS)
            self._push(Part(self._open[start:cut], False))
            start = cut
        self._open = self._open[start:]

    def _push(self, part: Part) -> None:
        self._batch.append((part, self._begins))
        self._begins = False
        self._batched += len(part.text)
        if self._batched > BATCH_CHARACTERS or len(self._batch) > BATCH_CHARACTERS // 64:
            self._flush()

    def _flush(self) -> None:
        encoder, entry = self._encoder, self._entry
        plain = iter(encoder.encode([part.text for part, _ in self._batch if not part.is_chat]))
        for part, begins in self._batch:
            ids = encoder.encode_chat(part.text) if part.is_chat else next(plain)
            block = encoder.start_of_text + ids if begins else ids
            block += encoder.end_of(part)
            self._stream.write(block)
            self._digest.update(block)
            entry["tokens"] += len(block) // encoder.dtype.itemsize
            shown = part.shown
            entry["bytes"] += len(shown.encode())
            entry["characters"] += len(shown)
            entry["fallback_tokens"] += encoder.count_fallback(ids)
            encoder.check(part, ids, self._tally)
        self._batch, self._batched = [], 0
