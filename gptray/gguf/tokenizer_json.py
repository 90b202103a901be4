"""Converts the tokenizer of a GGUF file to Hugging Face's tokenizer.json.

Supports byte-level BPE ("gpt2") and SentencePiece's BPE ("llama"). A GGUF file only names
llama.cpp's pre-tokenizer; its regular expression is here.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptray.config import UserError
from gptray.gguf.sentencepiece import MARK, character_model, piece_merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_WORD}{_UPPER}*{_LOWER}+%s|{_WORD}{_UPPER}+{_LOWER}*%s|"
_CASED_REST = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
# By the regular expression of a pre-tokenizer (None: GPT-2's), llama.cpp's names for it; export
# writes the first.
_LLAMA3 = _LETTERS + r"\p{N}{1,3}" + _REST
_PRE_TOKENIZERS: dict[str | None, tuple[str, ...]] = {
    None: ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais",
           "trillion", "granite-docling"),
    _LETTERS + r"\p{N}" + _REST: ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2",
                                  "hunyuan", "solar-open", "grok-2"),
    _LLAMA3: ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "llama-bpe", "llama3", "llama-v3",
              "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    _CASED % ("", "") + r"\p{N}" + _CASED_REST: ("tekken",),
    _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + r"\p{N}{1,3}" + _CASED_REST: (
        "gpt-4o", "llama4", "kanana2"),
}  # fmt: skip
# GPT-2's, after splitting off each digit.
_BY_DIGIT = ("smollm", "exaone", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
PRE_TOKENIZERS = {
    name: pattern for pattern, names in _PRE_TOKENIZERS.items() for name in names
} | dict.fromkeys(_BY_DIGIT)
# Pre-tokenizers of tokenizers that take a word that is a token whole (ignore_merges), and that
# begin a text with a special token unless the file says otherwise.
IGNORES_MERGES = (
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "tekken",
)  # fmt: skip
# A placeholder if there are no merges, because llama.cpp needs one; no text has these symbols.
NO_MERGES = ["<|<| |>|>"]

_ROLES = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
_SENTENCEPIECE_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Tokens that end a turn and a message.
MORE_ENDS = ("eot_token_id", "eom_token_id")


def tokenizer_json(fields: Mapping[str, object]) -> dict[str, object]:
    """The tokenizer.json for a file's fields. Raises UserError for an unsupported tokenizer."""
    tokens, types = _tokens(fields)
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] != USER_DEFINED,
        }
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _post_processor(fields),
        **(_sentencepiece_parts(fields) if _is_pieces(fields) else _byte_level_parts(fields)),
    }


def special_ids(fields: Mapping[str, object]) -> dict[str, int]:
    """The ids of special tokens by config.json's names, such as eos_token_id."""
    ids = {f"{role}_id": _id(fields, key) for key, role in _ROLES.items()}
    return {name: number for name, number in ids.items() if number is not None}


def end_ids(fields: Mapping[str, object]) -> int | list[int] | None:
    """The ids of all tokens that end a text, in the format of generation_config.json."""
    found = (_id(fields, key) for key in ("eos_token_id", *MORE_ENDS))
    ids = list(dict.fromkeys(one for one in found if one is not None))
    return ids if len(ids) > 1 else next(iter(ids), None)


def special_tokens(fields: Mapping[str, object]) -> dict[str, str]:
    """The names of special tokens by role, such as eos_token."""
    tokens, _ = _tokens(fields)
    ids = special_ids(fields)
    return {name.removesuffix("_id"): tokens[number] for name, number in ids.items()}


def _is_pieces(fields: Mapping[str, object]) -> bool:
    return fields.get(KEY + "model") == "llama"


def _id(fields: Mapping[str, object], key: str) -> int | None:
    """The id of a special token, if there is one."""
    tokens, types = _tokens(fields)
    default = _SENTENCEPIECE_IDS.get(key) if _is_pieces(fields) and BYTE in types else None
    number = fields.get(KEY + key, default)
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _byte_level_parts(fields: Mapping[str, object]) -> dict[str, object]:
    """The steps of byte-level BPE."""
    model, pre = fields.get(KEY + "model"), fields.get(KEY + "pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"its tokenizer ({model}, {pre}) is not supported; llama is, and gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    tokens, types = _tokens(fields)
    merges = _texts(fields, "merges")
    return {
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(pre),
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "ignore_merges": pre in IGNORES_MERGES,
            "vocab": {
                token: number for number, token in enumerate(tokens) if types[number] != UNUSED
            },
            "merges": [] if merges == NO_MERGES else [_pair(merge) for merge in merges],
        },
    }


def _pair(merge: str) -> list[str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise UserError(f"its tokenizer has a merge {merge!r:.60}, which is not a pair")
    return [left, right]


def _sentencepiece_parts(fields: Mapping[str, object]) -> dict[str, object]:
    """The steps of SentencePiece's BPE, or of a tokenizer with one token per character."""
    tokens, types = _tokens(fields)
    kept = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    normal = [number for number, kind in enumerate(types) if kind == NORMAL]
    if BYTE not in types:
        return character_model(tokens, normal)
    scores = fields.get(KEY + "scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, (int, float)) for score in scores)
    ):
        raise UserError("its tokens have no scores")
    prefix = fields.get(KEY + "add_space_prefix", True) is not False
    spaces: dict[str, object] = {
        "type": "Replace", "pattern": {"String": " "}, "content": MARK,
    }  # fmt: skip
    back = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    decoders: list[object] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        before = {"type": "Prepend", "prepend": MARK}
        spaces = {"type": "Sequence", "normalizers": [before, spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = _id(fields, "unknown_token_id")
    return {
        "normalizer": spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": kept,
            "merges": piece_merges(tokens, normal, scores),
        },
    }


def _post_processor(fields: Mapping[str, object]) -> dict[str, object] | None:
    """The post-processor that puts special tokens around a text, if any."""
    pre, names = fields.get(KEY + "pre"), special_tokens(fields)
    is_asked = {
        "bos_token": fields.get(KEY + "add_bos_token", _is_pieces(fields) or pre in IGNORES_MERGES),
        "eos_token": fields.get(KEY + "add_eos_token", False),
    }
    ids = special_ids(fields)
    used = {role: name for role, name in names.items() if is_asked.get(role)}
    if not used:
        return None

    def special(role: str, number: int) -> list[object]:
        return [{"SpecialToken": {"id": used[role], "type_id": number}}] if role in used else []

    def around(text: str, number: int) -> list[object]:
        one = {"Sequence": {"id": text, "type_id": number}}
        return [*special("bos_token", number), one, *special("eos_token", number)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [ids[f"{role}_id"]], "tokens": [name]}
            for role, name in used.items()
        },
    }


def _pre_tokenizer(pre: str) -> dict[str, object]:
    """The pre-tokenizer of one of `PRE_TOKENIZERS`."""
    pattern = PRE_TOKENIZERS[pre]
    if pattern is not None:
        first: dict[str, object] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [first, {**_BYTES, "use_regex": False}]}
    if pre in _BY_DIGIT:
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
