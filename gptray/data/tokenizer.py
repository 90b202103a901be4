"""Tokenizers: trained here (byte-level BPE, characters) or any of Hugging Face's.

All are saved as an ordinary tokenizer.json that `AutoTokenizer` opens. Text that spells a special
token is plain text. The prefix that a tokenizer puts before a text, such as <s>, belongs only at
its start, so `encode` omits it and `prompt_ids` adds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptray.data.boundary import chunks
from gptray.data.tokenizer_ends import end_of_text
from gptray.data.tokenizer_files import END_OF_TEXT, open_tokenizer
from gptray.data.tokenizer_parts import TokenizerParts
from gptray.data.tokenizer_prefix import check_prefix, text_prefix
from gptray.data.trust import UnreadableText, panics_as_errors, unreadable
from gptray.data.written_names import WrittenNames, put_together

_PROBES = (
    "one two",
    "\uac00\ub098 \ub2e4 1 b",
    "x1\n\ny.\nz",
    "A  b   c\n",
    "it's 10 \n\n 20",
    "\u4e00\u3002\n\u4e8c",
)
_ANY_CHARACTER = tokenizers.Regex(r"[\s\S]")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the names of its special tokens, `eos_token` among them."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        # Encodes "<|endoftext|>" in a document as plain text; this setting is not saved.
        self._backend.encode_special_tokens = True
        self._special = special
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos_token = special["eos_token"]
        self.eos_id = vocab[special["eos_token"]]
        self._characters = vocab if _one_token_per_character(backend) else None

    @property
    def sha256(self) -> str:
        """The sha256 of tokenizer.json."""
        return hashlib.sha256(self._json()).hexdigest()

    @property
    def is_by_character(self) -> bool:
        """Whether it has one token per character; unknown characters are then an error."""
        return self._characters is not None

    def parts(self) -> TokenizerParts:
        """The contents of tokenizer.json."""
        parts: TokenizerParts = json.loads(self._json())
        return parts

    @cached_property
    def names(self) -> list[str]:
        """The name of each token in the vocabulary, by id; "" for ids without a token."""
        names = [""] * self.vocab_size
        for name, number in self._backend.get_vocab(with_added_tokens=True).items():
            names[number] = name
        return names

    @property
    def special_names(self) -> dict[str, str]:
        """The names of the special tokens by role, including `eos_token`."""
        return dict(self._special)

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens by role, including `eos_token`."""
        ids = {role: self._backend.token_to_id(name) for role, name in self._special.items()}
        return {role: number for role, number in ids.items() if number is not None}

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that it puts before a text, such as <s>; empty for GPT-2 and Qwen."""
        return text_prefix(self._backend)

    @property
    def document_prefix(self) -> list[int]:
        """The prefix of documents in a token stream; empty if it is the end-of-text token.

        That token then both ends a document and begins the next.
        """
        return [] if self.eos_id in self.prefix else self.prefix

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens.

        Raises UnreadableText if it lacks a token and has no unknown token.
        """
        return self.encode_batch([text])[0]

    def prompt_ids(
        self, text: str, *, parse_special: bool = False, add_prefix: bool = True
    ) -> list[int]:
        """Token ids of a prompt; an empty text becomes the start of a new document.

        The prefix comes first and only once, even if the text begins with its name (<s>).
        parse_special: read the names of special tokens in the text as those tokens.
        add_prefix: whether a text that does not begin with the prefix gets it.
        Raises UserError as `encode` does.
        """
        if parse_special:
            ids = self.chat_ids(text)
            if add_prefix and ids[: len(self.prefix)] != self.prefix:
                ids = self.prefix + ids
            return ids or [self.eos_id]
        rest = text[len(self.prefix_name) :] if self.begins_with_prefix(text) else text
        prefix = self.prefix if add_prefix or rest is not text else []
        return prefix + self.encode(rest) or [self.eos_id]

    def chat_ids(self, chat: str) -> list[int]:
        """Token ids of a rendered chat template, which writes special tokens by their names.

        Names that were taken apart (see `WrittenNames`) stay text. Raises UserError as `encode`
        does.
        """
        if self._characters is None and put_together(chat) == chat:
            # In one go, as transformers does: the start of the text and spaces beside names matter.
            return self._encode_by(self._special_parser, [chat])[0]
        encoded = (
            [part] if isinstance(part, int) else self.encode(put_together(part))
            for part in self.written_names.parts(chat)
        )
        return [number for ids in encoded for number in ids]

    @cached_property
    def _special_parser(self) -> tokenizers.Tokenizer:
        """A copy of the backend that parses the names of special tokens."""
        parser = tokenizers.Tokenizer.from_str(self._backend.to_str())
        if self.eos_id not in parser.get_added_tokens_decoder():
            parser.add_special_tokens([self.eos_token])
        return parser

    @cached_property
    def written_names(self) -> WrittenNames:
        """Finds the names of special tokens in texts."""
        added = self._backend.get_added_tokens_decoder().items()
        ids = {one.content: number for number, one in added if one.special}
        return WrittenNames(ids | {self.eos_token: self.eos_id})

    def begins_with_prefix(self, text: str) -> bool:
        """Whether a text begins with the prefix's name, as chat templates write it."""
        return bool(self.prefix_name) and text.startswith(self.prefix_name)

    @cached_property
    def prefix_name(self) -> str:
        """The prefix as text."""
        return "".join(self._backend.id_to_token(number) or "" for number in self.prefix)

    def last_ids(self, ids: list[int], count: int) -> list[int]:
        """The last ids of a prompt, at most `count`, keeping its prefix if it has one."""
        if len(ids) <= count:
            return ids
        kept = len(self.prefix) if ids[: len(self.prefix)] == self.prefix else 0
        return ids[:kept] + ids[len(ids) - max(count - kept, 0) :]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        Raises UnreadableText as `encode` does.
        """
        if self._characters is not None:
            return [self._encode_characters(text, self._characters) for text in texts]
        return self._encode_by(self._backend, texts)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; special tokens appear by name, or not at all with `skip_special`."""
        with panics_as_errors():
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def cuts_at_boundaries(self) -> bool:
        """Whether cutting text at the boundaries of `gptray.data.boundary` keeps its tokens."""
        if self._characters is not None:
            return True
        try:
            return all(
                self.encode(text) == [i for chunk in chunks(text) for i in self.encode(chunk)]
                for text in _PROBES
            )
        except UnreadableText:
            return False  # unknown: it cannot read the probes

    def save(self, folder: str | Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._json())
        # No model_max_length: the model's config says how long its context is.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "special_tokens_map.json", self._special)

    @classmethod
    def load(cls, source: str | Path, *, eos_token: str | None = None) -> Tokenizer:
        """Open a tokenizer, model, run or prepared-data folder, a tokenizer file or a hub id.

        eos_token: the end-of-text token, if the tokenizer names none or the wrong one.
        Raises UserError if there is no tokenizer or no end-of-text token.
        """
        opened = backend, special = open_tokenizer(str(source))
        eos = end_of_text(opened, str(source), asked=eos_token)
        tokenizer = cls(backend, {**special, "eos_token": eos})
        check_prefix(tokenizer.prefix, tokenizer.vocab_size, str(source))
        return tokenizer

    def _json(self) -> bytes:
        return self._backend.to_str().encode()

    @staticmethod
    def _encode_by(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            with panics_as_errors():
                encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises nothing narrower
            raise unreadable(backend, texts, error) from None
        return [encoding.ids for encoding in encodings]

    @staticmethod
    def _encode_characters(text: str, ids: dict[str, int]) -> list[int]:
        try:
            return [ids[character] for character in text]
        except KeyError as error:
            character = str(error.args[0])
            raise UnreadableText(
                f"the character tokenizer does not know {character!r} (U+{ord(character):04X}): "
                "it was not in the text that the tokenizer was made from",
                character,
            ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE like GPT-2's; the same texts in the same order give the same bytes.

    Too little text gives fewer than `vocab_size` entries. (Sennrich et al. 2016; Radford et al.
    2019)
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # All 256 bytes, or text unlike the training text would lose them.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"eos_token": END_OF_TEXT})


def char_tokenizer(alphabet: Iterable[str]) -> Tokenizer:
    """One token per character, in code point order as in nanoGPT; end of text comes last."""
    characters = sorted(set(alphabet))
    vocab = {character: i for i, character in enumerate([*characters, END_OF_TEXT])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(_ANY_CHARACTER, "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, {"eos_token": END_OF_TEXT})


def _one_token_per_character(backend: tokenizers.Tokenizer) -> bool:
    """Whether `char_tokenizer` made it, so that a dict encodes the same, but faster."""
    if not isinstance(backend.model, models.WordLevel):
        return False
    split = pre_tokenizers.Split(_ANY_CHARACTER, "isolated")
    return (
        backend.normalizer is None
        and repr(backend.pre_tokenizer) == repr(split)
        and repr(backend.decoder) == repr(decoders.Fuse())
        and backend.token_to_id(backend.model.unk_token) is None
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
