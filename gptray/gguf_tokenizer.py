"""The tokenizer of a GGUF file as Hugging Face's tokenizer.json: byte-level BPE.

How llama.cpp cuts text into words is known by name alone; a GGUF file does not say it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptray.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By llama.cpp's names: the regular expression that cuts text into words; None: GPT-2's, after
# digits for SmolLM.
CUTS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"\p{N}" + _REST,
}
# Whose words, if they are tokens, are taken whole, whatever the merges say.
TAKES_WHOLE = ("llama-bpe",)
# Stands where there are no merges, for llama.cpp asks for some: no text comes to these two symbols.
NO_MERGES = ["<|<| |>|>"]

_ROLES = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "padding_token_id": "pad_token"}


def tokenizer_json(fields: Mapping[str, object]) -> dict[str, object]:
    """tokenizer.json of a file's fields. Raises UserError for another kind of tokenizer."""
    model, pre = fields.get(KEY + "model"), fields.get(KEY + "pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in CUTS:
        raise UserError(
            f"its tokenizer ({model}, {pre}) is not one that can be read; those of gpt2 with "
            f"{', '.join(CUTS)} can"
        )
    tokens, types = _tokens(fields)
    merges = _texts(fields, "merges")
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] == CONTROL,
        }
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _cut(pre),
        "post_processor": None,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "ignore_merges": pre in TAKES_WHOLE,
            "vocab": {
                token: number for number, token in enumerate(tokens) if types[number] != UNUSED
            },
            "merges": [] if merges == NO_MERGES else [merge.split(" ") for merge in merges],
        },
    }


def special_ids(fields: Mapping[str, object]) -> dict[str, int]:
    """The ids of special tokens by config.json's names, such as eos_token_id."""
    tokens, _ = _tokens(fields)
    ids = {f"{role}_id": fields.get(KEY + key) for key, role in _ROLES.items()}
    return {
        name: number
        for name, number in ids.items()
        if isinstance(number, int) and 0 <= number < len(tokens)
    }


def special_tokens(fields: Mapping[str, object]) -> dict[str, str]:
    """The names of special tokens by what they are for, such as eos_token."""
    tokens, _ = _tokens(fields)
    ids = special_ids(fields)
    return {name.removesuffix("_id"): tokens[number] for name, number in ids.items()}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _cut(pre: str) -> dict[str, object]:
    """The pre-tokenizer of one of `CUTS`."""
    pattern = CUTS[pre]
    if pattern is not None:
        first: dict[str, object] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [first, {**_BYTES, "use_regex": False}]}
    if pre == "smollm":
        first = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [first, _BYTES]}
    return _BYTES


def _tokens(fields: Mapping[str, object]) -> tuple[list[str], list[int]]:
    """Each token and its type."""
    tokens = _texts(fields, "tokens")
    types = fields.get(KEY + "token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UserError("its tokens have no types")
    return tokens, types


def _texts(fields: Mapping[str, object], name: str) -> list[str]:
    texts = fields.get(KEY + name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"its tokenizer has no {name}")
    return texts
