"""The manifest of a prepared data folder; sizes are in UTF-8 bytes of text.

The text of a chat is what the chat template writes.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class SourceEntry(TypedDict):
    """One input file; `path` is "builtin" for the text that ships with Python."""

    path: str
    size: int
    sha256: str


class CutEntry(TypedDict):
    """How the text was split."""

    fractions: list[float]
    cut_documents: int
    seed: int


class LostEntry(TypedDict):
    """Text that decoding does not restore: bytes by kind, and examples (kind, text, decoded)."""

    kinds: dict[str, int]
    examples: list[list[str]]


class TemplateEntry(TypedDict, total=False):
    """A tokenizer's chat template, if it has one."""

    chat_template: str  # its sha256
    end_of_turn_id: int  # the token that ends a message, if any documents are chats


class TokenizerEntry(TemplateEntry):
    source: str
    sha256: str
    vocab_size: int
    eos_token: str
    eos_token_id: int
    # The tokens that every document begins with, if any.
    document_prefix: NotRequired[list[int]]
    lost: LostEntry


class Counts(TypedDict):
    """Counts of a text and its tokens. `bytes` are UTF-8 bytes, without end-of-text tokens.

    Data that was prepared without counting lacks the last two.
    """

    tokens: int
    bytes: int
    lost_bytes: int
    characters: NotRequired[int]
    fallback_tokens: NotRequired[int]  # parts of characters, and unknown tokens


class ShardEntry(Counts):
    """One file of tokens."""

    file: str
    sha256: str


class SplitEntry(Counts):
    """One split, as the sum of its shards."""

    documents: int
    shards: list[ShardEntry]


class Provenance(TypedDict):
    """The origin of the tokens: sources, split and counts."""

    format: int
    request: dict[str, object]
    sources: list[SourceEntry]
    val_source: NotRequired[list[SourceEntry]]
    test_source: NotRequired[list[SourceEntry]]
    split: CutEntry
    fraction: float
    documents: int
    # How many of the documents are chats, written by the chat template, if any are.
    chats: NotRequired[int]
    bytes: int
    empty_rows: int


class DataManifest(Provenance):
    tokenizer: TokenizerEntry
    dtype: str
    splits: dict[str, SplitEntry]
    warnings: list[str]
