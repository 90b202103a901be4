"""Tokens that spell out parts of characters: counted while tokenizing, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import tokenizers

from gptray.data.data_manifest import DataManifest
from gptray.data.fallback import fallback_warning, token_measures, token_words
from gptray.data.shards import ShardEncoder, ShardWriter
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from tests.data.foreign import korean_lines, llama, unigram, wordpiece

KOREAN = korean_lines(40)


def manifest_of(tokenizer: Tokenizer, text: str, folder: Path) -> DataManifest:
    """What preparing a text writes down, as far as it matters here."""
    with ShardWriter(folder / "part", ShardEncoder(tokenizer)) as writer:
        for line in text.splitlines():
            writer.add(line, begins=True, ends=True)
    assert writer.shard
    splits = {"train": writer.shard.entry}
    manifest = {"splits": splits, "tokenizer": {"vocab_size": tokenizer.vocab_size}}
    return cast(DataManifest, manifest)


def test_syllables_in_bytes_are_counted_and_the_key_to_raise_is_named(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sees a dog"], 270)
    text = "\ud55c\uad6d\uc5b4 ok\n" * 10
    manifest = manifest_of(tokenizer, text, tmp_path)
    # Nine bytes, three characters of ASCII and the end of text of a line.
    assert token_measures(manifest) == pytest.approx(
        {"bytes_per_token": 12 / 13, "tokens_per_character": 13 / 6, "fallback": 9 / 13}
    )
    assert token_words(manifest) == (
        "0.92 bytes each, 2.17 per character; 69.2% are parts of characters or unknown"
    )
    size = tokenizer.vocab_size
    told = fallback_warning(manifest, asked=size)
    assert told and told.startswith("69.2% of the tokens are parts of characters")
    assert told.endswith(f"raise data.vocab_size from {size}, for example to {4 * size}")
    short = fallback_warning(manifest, asked=5000)
    assert short and short.endswith(f"too short for data.vocab_size=5000, only for {size}")
    foreign = fallback_warning(manifest, asked=None)
    assert foreign and foreign.endswith("data.tokenizer=bpe trains one on this text")
    chats = fallback_warning({**manifest, "chats": 1}, asked=None)
    assert chats and chats.endswith("; choose a model whose tokenizer suits it")


@pytest.mark.parametrize(
    ("backend", "end"), [(llama, "</s>"), (wordpiece, "[SEP]"), (lambda: unigram("<unk>"), "</s>")]
)
def test_byte_fallback_and_unknown_characters_count(
    backend: Callable[[], tokenizers.Tokenizer], end: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(backend(), {"eos_token": end})
    share = token_measures(manifest_of(tokenizer, "\ud55c\uad6d\uc5b4", tmp_path))["fallback"]
    assert share >= 1 / 3


@pytest.mark.parametrize("tokenizer", [train_bpe([KOREAN], 600), char_tokenizer(KOREAN)])
def test_a_tokenizer_made_for_the_text_raises_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = manifest_of(tokenizer, KOREAN, tmp_path)
    assert fallback_warning(manifest, asked=600) is None
    assert "unknown" not in token_words(manifest)
