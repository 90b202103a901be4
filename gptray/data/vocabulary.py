"""Rows of a model's embedding: those its tokenizer needs, and those another one can keep."""

from __future__ import annotations

import json

import tokenizers

from gptray.data.roundtrip import pieces
from gptray.data.tokenizer import Tokenizer


def needed_rows(tokenizer: Tokenizer) -> int:
    """How many rows an embedding must have: for all tokens but special ones at the end.

    No text has those: an added <pad>, for example.
    """
    special = {*tokenizer.written_names.ids.values()} - {tokenizer.eos_id, *tokenizer.prefix}
    rows = tokenizer.vocab_size
    while rows - 1 in special:
        rows -= 1
    return rows


def without_spare(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer without the special tokens at its end that an embedding of `rows` lacks."""
    parts, spare = tokenizer.parts(), {*tokenizer.names[rows:]}
    parts["added_tokens"] = [one for one in parts["added_tokens"] if one["content"] not in spare]
    vocab = parts["model"]["vocab"]
    parts["model"]["vocab"] = (
        {name: number for name, number in vocab.items() if number < rows}
        if isinstance(vocab, dict)
        else vocab[:rows]
    )
    special = {role: name for role, name in tokenizer.special_names.items() if name not in spare}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)), special)


def differing_ids(own: Tokenizer, other: Tokenizer) -> int:
    """How many ids stand for different tokens in two tokenizers that both have them."""
    return sum(a != b for a, b in zip(own.names, other.names, strict=False))


def kept_rows(own: Tokenizer, other: Tokenizer) -> list[int]:
    """For each id of `other`, the id of the same token in `own`; -1 if it has none.

    Tokens are the same if they have the same id and name, or else if they decode to the same bytes:
    " the" is "\u0120the" in GPT-2 and "\u2581the" in Llama. End-of-text tokens and prefixes
    correspond.
    """
    by_bytes: dict[bytes, int] = {}
    for number, piece in enumerate(pieces(own)):
        by_bytes.setdefault(piece, number)
    by_bytes.pop(b"", None)  # ids without a token
    rows = [by_bytes.get(piece, -1) for piece in pieces(other)]
    for number, (mine, name) in enumerate(zip(own.names, other.names, strict=False)):
        if mine == name:
            rows[number] = number
    for before, number in zip(own.prefix, other.prefix, strict=False):
        rows[number] = before
    rows[other.eos_id] = own.eos_id
    return rows
