"""Converts Hugging Face's SentencePiece tokenizers to llama.cpp's GGUF fields."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

from gptray.config import UserError
from gptray.data.tokenizer_parts import Step, TokenizerParts
from gptray.gguf.sentencepiece import MARK

log = logging.getLogger("gptray")

_MARKS: Step = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
# Gemma's, after its normalizer: there is no space left.
_CUTS_NOTHING: Step = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_PREPENDS: Step = {"type": "Prepend", "prepend": MARK}


def bpe_fields(parts: TokenizerParts, names: Sequence[str], padding: int) -> Mapping[str, object]:
    """The fields of a BPE with byte fallback. padding: how many unnamed tokens follow.

    llama.cpp uses no merges here: it joins two neighbours that form a token, the one with the
    highest score first. That is equivalent if every such pair is a merge, and all merges into one
    token come before those into the next. Raises UserError if it is not.
    """
    model, vocab = parts["model"], parts["model"]["vocab"]
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if not (model.get("byte_fallback") and has_bytes):
        raise UserError(
            "llama.cpp's tokenizers without byte-level or byte-fallback tokens fail on characters "
            "that they do not know"
        )
    prefix = _prefix(parts, parts["normalizer"], names)
    merges: list[tuple[str, str]] = [(left, right) for left, right in model["merges"]]
    joined = [left + right for left, right in merges]
    runs = len(joined) - sum(one == other for one, other in pairwise(joined))
    known = set(merges)
    complete = all(
        (name[:cut], name[cut:]) in known
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    )
    if runs != len(set(joined)) or not complete or model.get("ignore_merges"):
        raise UserError("llama.cpp cannot merge this tokenizer's pieces in the order of its merges")
    rank = {name: float(-number) for number, name in reversed([*enumerate(joined)])}
    scores = [rank.get(name, 0.0) for name in names]
    return {
        "model": "llama",
        "add_space_prefix": prefix,
        "scores": [*scores, *[0.0] * padding],
    }


def unigram_fields(
    parts: TokenizerParts, names: Sequence[str], padding: int
) -> Mapping[str, object]:
    """The fields of a unigram model. padding: how many unnamed tokens follow.

    Raises UserError for features that llama.cpp lacks.
    """
    model = parts["model"]
    if model.get("byte_fallback") or model.get("unk_id") is None:
        raise UserError(
            "llama.cpp's unigram tokenizer needs an unknown token and has no byte fallback"
        )
    score = dict(model["vocab"])
    charsmap, merges_spaces = _normalizer(parts["normalizer"])
    prefix = _prefix(parts, None, names)
    return {
        "model": "t5",
        "add_space_prefix": prefix,
        "remove_extra_whitespaces": merges_spaces,
        "unknown_token_id": model["unk_id"],
        "scores": [*(score.get(name, 0.0) for name in names), *[0.0] * padding],
        **({"precompiled_charsmap": charsmap} if charsmap else {}),
    }


def _prefix(parts: TokenizerParts, normalizer: Step | None, names: Sequence[str]) -> bool:
    """Whether the tokenizer puts a space before a text.

    Warns if llama.cpp would treat a text that begins with a space differently. Raises UserError for
    other ways of treating spaces.
    """
    before = parts["pre_tokenizer"]
    if before in (None, _CUTS_NOTHING) and normalizer == _MARKS:
        return False
    if before is None and normalizer == {"type": "Sequence", "normalizers": [_PREPENDS, _MARKS]}:
        return True
    match before:
        case {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": str(scheme),
            "split": bool(splits),
        } if normalizer is None and not (splits and any(MARK in name[1:] for name in names)):
            if scheme != "never":
                log.warning(
                    "llama.cpp puts a space before every text; this tokenizer does so only if "
                    "the text does not begin with one"
                )
            return scheme != "never"
    raise UserError("llama.cpp does not treat spaces as this tokenizer does")


def _normalizer(step: Step | None) -> tuple[bytes | None, bool]:
    """SentencePiece's character map, and whether repeated spaces become one."""
    match step:
        case None:
            return None, False
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            return base64.b64decode(charsmap), False
        case {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": str(charsmap)},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "\u2581"},
            ],
        }:
            return base64.b64decode(charsmap), True
    raise UserError("llama.cpp does not change text as this tokenizer's normalizer does")
