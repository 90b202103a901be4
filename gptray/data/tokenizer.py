"""Tokenizers: trained here (byte-level BPE, characters) or any of Hugging Face's.

Every one is saved as an ordinary tokenizer.json that `AutoTokenizer` opens. Text that spells a
special token is plain text here, and no special token is added; that is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptray.config import UserError
from gptray.data.boundary import chunks
from gptray.data.sources import hint

END_OF_TEXT = "<|endoftext|>"
KINDS = ("bpe", "char")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_PROBES = (
    "one two",
    "\uac00\ub098 \ub2e4 1 b",
    "x1\n\ny.\nz",
    "A  b   c\n",
    "it's 10 \n\n 20",
    "\u4e00\u3002\n\u4e8c",
)
_ANY_CHARACTER = tokenizers.Regex(r"[\s\S]")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges).*\.(json|txt|model)|.*\.model"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the names of its special tokens, `eos_token` among them."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        # Makes text such as "<|endoftext|>" in a document plain text; it is not saved.
        self._backend.encode_special_tokens = True
        self._special = special
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos_token = special["eos_token"]
        self.eos_id = vocab[special["eos_token"]]
        self._characters = vocab if _one_token_per_character(backend) else None

    @property
    def sha256(self) -> str:
        """Of the bytes of tokenizer.json."""
        return hashlib.sha256(self._json()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special token added.

        Raises UserError for a character that a character tokenizer does not know.
        """
        return self.encode_batch([text])[0]

    def prompt_ids(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids that a model continues; of an empty text the start of a fresh document.

        parse_special: the end-of-text token's own name in the text is that token, not plain text.
        Raises UserError as `encode`.
        """
        parts = text.split(self.eos_token) if parse_special else [text]
        ids = self.encode(parts[0])
        for part in parts[1:]:
            ids += [self.eos_id, *self.encode(part)]
        return ids or [self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special token added."""
        if self._characters is not None:
            return [self._encode_characters(text, self._characters) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens show as their names."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def cuts_at_boundaries(self) -> bool:
        """Whether text that is cut at `gptray.data.boundary`'s places gets the same tokens."""
        return self._characters is not None or all(
            self.encode(text) == [i for chunk in chunks(text) for i in self.encode(chunk)]
            for text in _PROBES
        )

    def save(self, folder: str | Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._json())
        # No model_max_length: what the model takes is the model's to say.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "special_tokens_map.json", self._special)

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Open a tokenizer, model, run or prepared-data folder, or a Hugging Face hub id.

        Raises UserError when there is none or it has no end-of-text token.
        """
        folder = tokenizer_folder(str(source))
        if folder is not None and (folder / "tokenizer.json").is_file():
            return cls._from_json(folder)
        return cls._from_transformers(str(folder or source))

    @classmethod
    def _from_json(cls, folder: Path) -> Tokenizer:
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path}: not a tokenizer: {error}") from None
        special: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                special |= _special_tokens(_read_json(folder / name))
        if "eos_token" not in special and (folder / "config.json").is_file():
            # A model's folder whose tokenizer class knows its special tokens, as GPT-2's does.
            return cls._from_transformers(str(folder))
        return cls._checked(backend, special, str(folder))

    @classmethod
    def _from_transformers(cls, source: str) -> Tokenizer:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"data.tokenizer={source}: neither a folder nor a hub id that could be loaded: "
                f"{reason}"
            ) from None
        if getattr(loaded, "backend_tokenizer", None) is None:
            raise UserError(f"data.tokenizer={source}: it has no tokenizer.json form")
        return cls._checked(
            loaded.backend_tokenizer, _special_tokens(loaded.special_tokens_map), source
        )

    @classmethod
    def _checked(
        cls, backend: tokenizers.Tokenizer, special: dict[str, str], source: str
    ) -> Tokenizer:
        eos = special.get("eos_token")
        if eos is None:
            raise UserError(
                f"data.tokenizer={source}: it has no end-of-text token; "
                "name one as eos_token in its tokenizer_config.json"
            )
        if backend.token_to_id(eos) is None:
            raise UserError(f"data.tokenizer={source}: eos_token {eos!r} is not in its vocabulary")
        return cls(backend, special)

    def _json(self) -> bytes:
        return self._backend.to_str().encode()

    @staticmethod
    def _encode_characters(text: str, ids: dict[str, int]) -> list[int]:
        try:
            return [ids[character] for character in text]
        except KeyError as error:
            character = str(error.args[0])
            raise UserError(
                f"the character tokenizer does not know {character!r} (U+{ord(character):04X}): "
                "it was not in the text that the tokenizer was made from"
            ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train GPT-2's kind of byte-level BPE; equal texts in equal order give equal bytes.

    Too little text for `vocab_size` entries gives fewer. (Sennrich et al. 2016; Radford et al.
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
    """One token per character, in code point order as in nanoGPT, and end of text last."""
    characters = sorted(set(alphabet))
    vocab = {character: i for i, character in enumerate([*characters, END_OF_TEXT])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(_ANY_CHARACTER, "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, {"eos_token": END_OF_TEXT})


def _one_token_per_character(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is what `char_tokenizer` makes: then a dict does the same, faster."""
    if not isinstance(backend.model, models.WordLevel):
        return False
    split = pre_tokenizers.Split(_ANY_CHARACTER, "isolated")
    return (
        backend.normalizer is None
        and repr(backend.pre_tokenizer) == repr(split)
        and backend.token_to_id(backend.model.unk_token) is None
    )


def tokenizer_folder(source: str) -> Path | None:
    """The folder that holds the tokenizer of a tokenizer, model, run or data folder.

    None: not a folder, so a hub id. Raises UserError for a path that is not there or holds none.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise UserError(f"data.tokenizer={source}: there is no such folder")
        near = hint(source.lower(), KINDS)
        if near and "/" not in source:
            raise UserError(f"data.tokenizer={source}: neither a folder nor a known kind{near}")
        return None
    for candidate in (folder, folder / "model", folder / "tokenizer"):
        if candidate.is_dir() and tokenizer_files(candidate):
            return candidate
    raise UserError(f"data.tokenizer={source}: the folder holds no tokenizer (tokenizer.json)")


def folder_sha256(folder: Path) -> str:
    """Identity of a tokenizer folder: of the names and bytes of its tokenizer files."""
    digest = hashlib.sha256()
    for path in tokenizer_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer is made of; none: it holds no tokenizer."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILES.fullmatch(path.name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Names of special tokens; files give them as text or as an object with `content`."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            found[name] = str(value)
    return found
