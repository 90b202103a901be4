"""The prefix that a tokenizer puts before a text, such as <s>, from its post-processor.

A suffix is ignored: a prompt is there to be continued, and a training document ends with the
end-of-text token anyway.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile

import tokenizers
from tokenizers import models

from gptray.config import UserError
from gptray.data.tokenizer_files import open_tokenizer


def text_prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The special token ids that the post-processor puts before every text; often none."""
    processor = backend.post_processor
    if processor is None:
        return []
    # Any text will do, such as one token: processors do not look at it.
    word = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    processed = processor.process(word, None, True)
    added = zip(processed.ids, processed.special_tokens_mask, strict=True)
    return [number for number, _ in takewhile(lambda one: one[1], added)]


@lru_cache(maxsize=16)
def stored_prefix(source: str, sha256: str) -> list[int]:
    """`text_prefix` of a tokenizer on disk. sha256: part of the cache's key, for changed files."""
    backend, _ = open_tokenizer(source)
    return text_prefix(backend)


def check_prefix(prefix: list[int], vocab_size: int, source: str) -> None:
    """Raise UserError if the prefix has an id beyond the vocabulary."""
    for number in prefix:
        if number >= vocab_size:
            raise UserError(
                f"data.tokenizer={source}: it puts token {number:,} before every text, but has "
                f"only {vocab_size:,} tokens"
            )
