"""Tokenizers of the kinds that users bring, small, each trained on a few English lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptray.data.tokenizer import Tokenizer
from tests.tiny import tiny_text

LINES = tiny_text(200).splitlines()
SYLLABLES = "가나다라마바사아자차카타파하고노도로모보소"


def korean_lines(count: int, *, seed: int = 3) -> str:
    """Lines of Korean words from a small vocabulary, some with a number or a full stop."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(60)]
    return "".join(
        " ".join(rng.choices(words, k=rng.randint(3, 7))) + rng.choice([".", "", " 12"]) + "\n"
        for _ in range(count)
    )


def save(
    backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any] | None = None
) -> Path:
    """Write a folder as users have it; without settings there is nothing but tokenizer.json."""
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def wordpiece() -> tokenizers.Tokenizer:
    """BERT's: lower case, words that it does not know are [UNK], no end of text."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return _trained(backend, trainers.WordPieceTrainer, 200, special)


def dropping_bpe() -> tokenizers.Tokenizer:
    """Character-level BPE without an unknown token: characters that it does not know vanish."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(backend, trainers.BpeTrainer, 100, ["</s>"])


def unigram(unknown: str | None) -> tokenizers.Tokenizer:
    """T5's; without an unknown token it raises for what it does not know."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    more = {"unk_token": unknown} if unknown else {}
    special = [*([unknown] if unknown else []), "</s>"]
    return _trained(backend, trainers.UnigramTrainer, 80, special, **more)


def word_level() -> tokenizers.Tokenizer:
    """Whole words, and none for those that it does not know: it raises."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(backend, trainers.WordLevelTrainer, 100, ["</s>"])


def llama() -> tokenizers.Tokenizer:
    """Llama 2's: byte fallback, a space put before every text and taken away again."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    _trained(backend, trainers.BpeTrainer, 400, special)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return backend


def gemma() -> tokenizers.Tokenizer:
    """Gemma's: byte fallback, no space before a text, and a cut at spaces, where none is left."""
    backend = llama()
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def llama_first() -> tokenizers.Tokenizer:
    """Mistral's: only a text's own start gets a space; bytes are no special tokens."""
    parts = json.loads(llama().to_str())
    parts["added_tokens"] = [one for one in parts["added_tokens"] if "<0x" not in one["content"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def byte_level(*, prefix: bool = False, composed: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's; `prefix`: a space before every text; `composed`: Qwen's, in Unicode's NFC."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if composed else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    return _trained(backend, trainers.BpeTrainer, 300, special, initial_alphabet=alphabet)


def beginning(backend: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    """The tokenizer with special tokens around every text, such as "<s> $A"; new ones are added."""
    names = [name for name in template.split() if name != "$A"]
    backend.add_special_tokens([name for name in names if backend.token_to_id(name) is None])
    special = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return backend


def as_tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer, ended by its last special token."""
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    ends = [name for name in added if name in ("</s>", "[SEP]", "<|endoftext|>")]
    return Tokenizer(backend, {"eos_token": ends[0]})


def _trained(
    backend: tokenizers.Tokenizer,
    trainer: Callable[..., Any],
    size: int,
    special: Sequence[str],
    **more: Any,
) -> tokenizers.Tokenizer:
    made = trainer(vocab_size=size, special_tokens=list(special), show_progress=False, **more)
    backend.train_from_iterator(LINES, made)
    return backend
