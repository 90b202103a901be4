"""Checks whether decoding a text's tokens restores the text, and measures what is lost.

Byte-level BPE and character tokenizers are lossless by design. Others are checked on all text,
mostly without their decoder: if it only joins one piece per token, joining the pieces here gives
the same and is many times as fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import pre_tokenizers

from gptray.data.difference import Lost, measure
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_parts import AddedToken, Step, TokenizerParts

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KEEPS_ALL = ("isolated", "mergedwithprevious", "mergedwithnext", "contiguous")


class RoundTrip:
    """Compares texts with their decoded tokens.

    A space that decoding adds in front of a text is not a loss: some tokenizers begin every text
    with one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        parts = tokenizer.parts()
        self.is_lossless = tokenizer.is_by_character or _is_byte_level(parts)
        self._decoder = None if self.is_lossless else _PieceDecoder.of(parts, tokenizer)
        # Whether a text's losses are the sum of its chunks' losses.
        self.adds_up = self._decoder is not None and self._decoder.starts_plainly
        self.unknown = unknown_name(parts)

    def lost(self, text: str, ids: Sequence[int], *, begins: bool = True) -> Lost | None:
        """What `text` loses if it is decoded from `ids`; None if nothing."""
        back = self.back(text, ids, begins=begins)
        return None if back is None else measure(text, back, self.unknown)

    def back(self, text: str, ids: Sequence[int], *, begins: bool = True) -> str | None:
        """Decode the `ids` of `text`; None if that gives the text itself.

        begins: `text` begins a document, so a space that decoding puts before it is ignored.
        """
        if self.is_lossless:
            return None
        if self._decoder:
            joined = self._decoder.join(ids)
            if joined == text.encode():
                return None
            back = joined.decode(errors="replace")
        else:
            back = self._tokenizer.decode(ids)
        if begins and back.startswith(" ") and not text.startswith(" "):
            back = back[1:]
        return None if back == text else back


@lru_cache(maxsize=2)
def pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token, by id; its name if the decoder does not simply join pieces.

    Empty for ids without a token.
    """
    decoder = _PieceDecoder.of(tokenizer.parts(), tokenizer)
    return decoder.pieces if decoder else [name.encode() for name in tokenizer.names]


def is_byte_token(name: str) -> bool:
    """Whether a token stands for a byte, such as <0x41> (SentencePiece's byte fallback)."""
    return _BYTE_TOKEN.fullmatch(name) is not None


class _PieceDecoder:
    """A decoder that joins one piece per token and may then strip the start."""

    def __init__(self, pieces: list[bytes], firsts: list[bytes] | None, strip: int) -> None:
        self.pieces, self._firsts, self._strip = pieces, firsts, strip
        self.starts_plainly = firsts is None and not strip

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text's tokens; decoding shows invalid UTF-8 as U+FFFD."""
        joined = b"".join(map(self.pieces.__getitem__, ids))
        if self._firsts and ids:
            joined = self._firsts[ids[0]] + joined[len(self.pieces[ids[0]]) :]
        for _ in range(self._strip):
            joined = joined.removeprefix(b" ")
        return joined

    @classmethod
    def of(cls, parts: TokenizerParts, tokenizer: Tokenizer) -> _PieceDecoder | None:
        """The decoder of a tokenizer.json; None if it is not like GPT-2's, Llama's or T5's."""
        decoder = parts["decoder"] or {}
        names = tokenizer.names
        match decoder:
            case {"type": "ByteLevel"}:
                return cls([_token_bytes(name) for name in names], None, 0)
            case {"type": "Fuse"}:
                return cls([name.encode() for name in names], None, 0)
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme}:
                pieces = [name.replace(mark, " ").encode() for name in names]
                firsts = [name.replace(mark, "").encode() for name in names]
                return cls(pieces, None if scheme == "never" else firsts, 0)
            case {"type": "Sequence", "decoders": list(steps)}:
                return cls._of_steps(steps, names)
        return None

    @classmethod
    def _of_steps(cls, steps: Sequence[Step], names: list[str]) -> _PieceDecoder | None:
        pieces, fused, strip, has_bytes = names, False, 0, False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                    not fused
                ):
                    pieces = [piece.replace(old, new) for piece in pieces]
                case {"type": "ByteFallback"} if not fused:
                    has_bytes = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                    strip += start
                case _:
                    return None
        of_bytes = [_BYTE_TOKEN.fullmatch(piece) if has_bytes else None for piece in pieces]
        return cls(
            [
                bytes([int(byte[1], 16)]) if byte else piece.encode()
                for byte, piece in zip(of_bytes, pieces, strict=True)
            ],
            None,
            strip,
        )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's mapping of 256 characters to bytes in a byte-level vocabulary.

    Printable bytes map to themselves; the others, in order, to U+0100 and up.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {chr(byte): byte for byte in own}
    alphabet |= {chr(0x100 + number): byte for number, byte in enumerate(others)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


_ALPHABET = _byte_alphabet()


def _token_bytes(name: str) -> bytes:
    """Decode a byte-level token: to its bytes, or to its name if that is not byte-level."""
    try:
        return bytes([_ALPHABET[character] for character in name])
    except KeyError:
        return name.encode()


def _is_byte_level(parts: TokenizerParts) -> bool:
    """Whether a tokenizer.json is byte-level BPE that cannot lose anything.

    Every byte of a text becomes a character in the vocabulary, so nothing is unknown; merges only
    join neighbours, and the decoder turns each character back into its byte. Anything that could
    interfere is excluded: normalizers, pre-tokenizers that remove or add text, subword prefixes and
    suffixes, and added tokens that match more than their own text.
    """
    model = parts["model"]
    vocab = model["vocab"]
    return (
        parts["normalizer"] is None
        and (parts["decoder"] or {}).get("type") == "ByteLevel"
        and model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and isinstance(vocab, dict)
        and _ALPHABET.keys() <= vocab.keys()
        and _only_splits(parts["pre_tokenizer"])
        and all(map(_is_plain, parts["added_tokens"]))
    )


def _only_splits(step: Step | None) -> bool:
    """Whether a pre-tokenizer only splits text before its bytes are mapped, adding no space."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return True
        case {"type": "Sequence", "pretokenizers": [*cuts, dict(last)]}:
            return (
                _only_splits(last) and last["type"] == "ByteLevel" and all(map(_keeps_text, cuts))
            )
    return False


def _keeps_text(step: Step) -> bool:
    kept = str(step.get("behavior", "")).lower() in _KEEPS_ALL
    return (step["type"] == "Split" and kept) or step["type"] == "Digits"


def _is_plain(added: AddedToken) -> bool:
    """Whether an added token is never matched in text, or decodes to what it matched."""
    if added["special"]:
        return True
    printable = all("!" <= character <= "~" for character in added["content"])
    return printable and not added["lstrip"] and not added["rstrip"]


def unknown_name(parts: TokenizerParts) -> str | None:
    """The name of the unknown token, if there is one."""
    model = parts["model"]
    vocab, unknown = model["vocab"], model.get("unk_id")
    if unknown is not None and isinstance(vocab, list):
        return str(vocab[unknown][0])
    return model.get("unk_token")
