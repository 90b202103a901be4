"""Converts a tokenizer to GGUF fields from which llama.cpp makes the same tokens, or refuses it.

llama.cpp implements only a few tokenizers: byte-level BPE ("gpt2") with a choice of
pre-tokenizers, SentencePiece's BPE ("llama") and SentencePiece's unigrams ("t5"). Their fields
are `tokenizer.ggml.*`. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tokenizers import pre_tokenizers

from gptray.config import UserError
from gptray.data.roundtrip import is_byte_token, unknown_name
from gptray.data.sentencepiece_fields import bpe_fields, unigram_fields
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_parts import ModelPart, Step, TokenizerParts
from gptray.data.vocabulary import needed_rows, without_spare
from gptray.gguf.sentencepiece import MARK
from gptray.gguf.tokenizer_json import (
    BYTE,
    CONTROL,
    IGNORES_MERGES,
    KEY,
    MORE_ENDS,
    NO_MERGES,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

log = logging.getLogger("gptray")

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # GGUF's spelling
    "pad_token": "padding_token_id",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's pre-tokenizer, by its regular expression and ignore_merges (words that are tokens
# stay whole).
_BY_PATTERN: dict[tuple[str, bool], str] = {(_GPT2, False): "gpt-2"} | {
    (pattern, name in IGNORES_MERGES): name
    for name, pattern in reversed(PRE_TOKENIZERS.items())
    if pattern
}


def gguf_vocabulary(
    tokenizer: Tokenizer, *, rows: int, ends: Sequence[int] = ()
) -> dict[str, object]:
    """The fields of a tokenizer.

    rows: those of the embedding; rows without a token are named [PADn]. Special tokens at the end
    without a row, such as an added <pad>, are left out.
    ends: tokens that end a text besides the tokenizer's own end of text.
    Raises UserError, one sentence, for a tokenizer that llama.cpp cannot reproduce.
    """
    if needed_rows(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model has only {rows:,}: "
            "train with model.resize_vocab=true first"
        )
    if tokenizer.vocab_size > rows:
        tokenizer = without_spare(tokenizer, rows)
    names = tokenizer.names
    parts = tokenizer.parts()
    refused = _context_dependent(parts)
    if refused:
        raise UserError(f"llama.cpp cannot match {refused!r} in text as this tokenizer does")
    special = tokenizer.special_ids
    ids = {key: special[role] for role, key in _SPECIAL_IDS.items() if role in special}
    before, after = _special_around(parts["post_processor"])
    bos, eos = names[ids.get("bos_token_id", tokenizer.eos_id)], tokenizer.eos_token
    if before not in ([], [bos]) or after not in ([], [eos]):
        around = ", ".join(before + after)
        raise UserError(f"llama.cpp does not put {around} around a text as this tokenizer does")
    fields = {
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "tokens": _texts(tokenizer, rows),
        "token_type": _types(tokenizer, parts, rows),
        "bos_token_id": tokenizer.eos_id,
        **ids,
        **_more_ends(tokenizer, ends),
        **_kind(tokenizer, parts, rows),
    }
    return {KEY + name: value for name, value in fields.items()}


def _more_ends(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, int]:
    """The GGUF fields for more tokens that end a text, filled in order."""
    names = tokenizer.names
    more = [one for one in dict.fromkeys(ends) if one != tokenizer.eos_id and one < len(names)]
    if left := more[len(MORE_ENDS) :]:
        log.warning(
            "a GGUF file has room for only %d tokens that end a text; llama.cpp may continue "
            "after %s",
            1 + len(MORE_ENDS),
            ", ".join(names[one] for one in left),
        )
    return dict(zip(MORE_ENDS, more, strict=False))


def _special_around(step: Step | None) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before a text and after it."""
    match step:
        case {"type": "Sequence", "processors": list(steps)}:
            pairs = [_special_around(one) for one in steps]
            return sum((pair[0] for pair in pairs), []), sum((pair[1] for pair in pairs), [])
        case {"type": "TemplateProcessing", "single": list(single)}:
            names = [one["SpecialToken"]["id"] if "SpecialToken" in one else "" for one in single]
            text = names.index("") if "" in names else len(names)
            return names[:text], names[text + 1 :]
    return [], []


def _kind(tokenizer: Tokenizer, parts: TokenizerParts, rows: int) -> Mapping[str, object]:
    """The fields that depend on which of llama.cpp's tokenizers it is."""
    if tokenizer.is_by_character:
        return _of_characters(tokenizer, rows)
    model = parts["model"]
    padding = rows - len(tokenizer.names)
    if model["type"] == "BPE" and (parts["decoder"] or {}).get("type") == "ByteLevel":
        return _byte_level_fields(parts)
    if model["type"] == "BPE":
        return bpe_fields(parts, tokenizer.names, padding)
    if model["type"] == "Unigram":
        return unigram_fields(parts, tokenizer.names, padding)
    raise UserError(f"llama.cpp has no tokenizer like this one ({model['type']})")


def _of_characters(tokenizer: Tokenizer, rows: int) -> Mapping[str, object]:
    """One token for each character: SentencePiece's BPE that never merges.

    It writes a space as U+2581, so a space and that character cannot both be tokens. A character
    without a token is an error in llama.cpp too.
    """
    if MARK in tokenizer.names:
        raise UserError(
            "the text has the character U+2581, which llama.cpp's tokenizers treat as a space; "
            "choose data.tokenizer=bpe"
        )
    return {"model": "llama", "add_space_prefix": False, "scores": [0.0] * rows}


def _byte_level_fields(parts: TokenizerParts) -> Mapping[str, object]:
    model = parts["model"]
    normalizer = (parts["normalizer"] or {}).get("type")
    is_whole = bool(model.get("ignore_merges"))
    cut = _pre_tokenizer_name(parts["pre_tokenizer"], is_whole)
    if normalizer == "NFC":
        log.warning(
            "the tokenizer composes characters (NFC) and llama.cpp does not: give llama.cpp NFC "
            "text"
        )
    elif normalizer is not None:
        raise UserError(f"llama.cpp does not support {normalizer} before byte-level BPE")
    if is_whole != (cut in IGNORES_MERGES) or not _is_plain_bpe(model):
        raise UserError("llama.cpp does not support byte-level BPE with these settings")
    merges = [f"{left} {right}" for left, right in model["merges"]]
    return {"model": "gpt2", "pre": cut, "merges": merges or NO_MERGES}


def _pre_tokenizer_name(step: Step | None, is_whole: bool) -> str:
    """llama.cpp's name for a pre-tokenizer. is_whole: words that are tokens stay whole."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            return "smollm"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(regex)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if name := _BY_PATTERN.get((regex, is_whole)):
            return name
    raise UserError("llama.cpp does not split text into words as this tokenizer does")


# Bytes that text has only by accident, by their byte-level names: control characters, and bytes
# that begin no character in use. Both tokenizers drop them if they have no token.
_RARE = {chr(256 + byte) for byte in range(32) if chr(byte) not in "\t\n\r"} | {
    chr(byte) for byte in (0xC0, 0xC1, *range(0xF1, 0x100))
}


def _is_plain_bpe(model: ModelPart) -> bool:
    """Whether it makes tokens by merging bytes and by nothing else."""
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(model["vocab"])
    return (
        not model.get("byte_fallback")
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (not missing or (missing <= _RARE and not model.get("unk_token")))
    )


def _texts(tokenizer: Tokenizer, rows: int) -> list[str]:
    """The token of each row as llama.cpp writes it; all are distinct."""
    names = tokenizer.names
    if tokenizer.is_by_character:
        names = [MARK if name == " " else name for name in names]
    names = [*names, *[""] * (rows - len(names))]
    padded = [name or f"[PAD{number}]" for number, name in enumerate(names)]
    assert len(set(padded)) == len(padded)
    return padded


def _types(tokenizer: Tokenizer, parts: TokenizerParts, rows: int) -> list[int]:
    added = {one["content"]: one["special"] for one in parts["added_tokens"]}
    unknown = unknown_name(parts)
    has_bytes = bool(parts["model"].get("byte_fallback"))

    def kind(number: int, name: str) -> int:
        if number == tokenizer.eos_id:
            return CONTROL
        if name == unknown:
            return UNKNOWN
        if has_bytes and is_byte_token(name):
            return BYTE
        if name in added:
            return CONTROL if added[name] else USER_DEFINED
        return NORMAL if name else UNUSED

    types = [kind(number, name) for number, name in enumerate(tokenizer.names)]
    return [*types, *[UNUSED] * (rows - len(types))]


def _context_dependent(parts: TokenizerParts) -> str | None:
    """An added token whose match in text depends on the characters around it, if any."""
    for one in parts["added_tokens"]:
        if not one["special"] and (one["lstrip"] or one["rstrip"] or one["single_word"]):
            return one["content"]
    return None
