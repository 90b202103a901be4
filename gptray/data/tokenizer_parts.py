"""The fields of Hugging Face's tokenizer.json that gptray reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Required, TypedDict

# A normalizer, pre-tokenizer, post-processor or decoder: its `type`, and that type's own fields.
Step = Mapping[str, object]


class ModelPart(TypedDict, total=False):
    """The model; `vocab` is {token: id}, or for Unigram a list of [token, score]."""

    type: Required[str]
    vocab: Required[dict[str, int] | list[tuple[str, float]]]
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    unk_id: int | None
    unk_token: str | None
    # BPE only.
    merges: list[tuple[str, str]]
    byte_fallback: bool
    ignore_merges: bool
    dropout: float | None


class AddedToken(TypedDict):
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class TokenizerParts(TypedDict):
    normalizer: Step | None
    pre_tokenizer: Step | None
    post_processor: Step | None
    decoder: Step | None
    model: ModelPart
    added_tokens: list[AddedToken]
