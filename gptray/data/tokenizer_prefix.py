"""What a tokenizer puts before a text, such as <s>: it stands in tokenizer.json's post-processor.

What it would put behind one is left out: a prompt is there to be continued, and a document that is
trained on ends with the end of text anyway.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile

import tokenizers
from tokenizers import models

from gptray.config import UserError
from gptray.data.tokenizer_files import open_tokenizer


def text_prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids that come before those of any text where special tokens are added; often none."""
    processor = backend.post_processor
    if processor is None:
        return []
    # Of a text of one token: processors do not look at texts.
    word = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    processed = processor.process(word, None, True)
    added = zip(processed.ids, processed.special_tokens_mask, strict=True)
    return [number for number, _ in takewhile(lambda one: one[1], added)]


@lru_cache(maxsize=16)
def stored_prefix(source: str, sha256: str) -> list[int]:
    """The same of a tokenizer on disk, see `open_tokenizer`. sha256: tells changed files apart."""
    backend, _ = open_tokenizer(source)
    return text_prefix(backend)


def check_prefix(prefix: list[int], vocab_size: int, source: str) -> None:
    """Raise UserError where it holds an id that no token has."""
    for number in prefix:
        if number >= vocab_size:
            raise UserError(
                f"data.tokenizer={source}: it puts token {number:,} before every text, but has "
                f"only {vocab_size:,} tokens"
            )
