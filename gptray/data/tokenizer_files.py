"""Finds and opens the tokenizer that `data.tokenizer` names.

That can be a folder (of a tokenizer, a model, a run or prepared data), a tokenizer.json under any
name, just GPT-2's vocab.json and merges.txt, or whatever `AutoTokenizer` opens, including the hub.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.data.trust import check_growth, check_vocabulary, panics_as_errors
from gptray.gguf.conversion import is_gguf, opened_gguf
from gptray.storage.files import expanded, is_uri
from gptray.storage.hub import NotOnHub, cached_model, download_model
from gptray.storage.node_cache import fetched_holder
from gptray.storage.stored import Locked, read_foreign, read_object
from gptray.storage.template_file import TEMPLATE, template_in
from gptray.wording import first_line

log = logging.getLogger("gptray")

END_OF_TEXT = "<|endoftext|>"
KINDS = ("bpe", "char")
# The usual end-of-text tokens, for tokenizers that name none.
WELL_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges).*\.(json|txt|model)|.*\.model"
)
# The files to fetch from a folder that a URI names.
_FETCHED = re.compile(rf"config\.json|{re.escape(TEMPLATE)}|{_TOKENIZER_FILES.pattern}")
_BELOW = ("model", "tokenizer")
_HUB_FILES = (
    "config.json", "tokenizer*.json", "tokenizer*.txt", "special_tokens_map.json",
    "added_tokens.json", "vocab*.json", "vocab*.txt", "merges*.txt", "*.model", TEMPLATE,
)  # fmt: skip
_VOCABULARY = ("vocab.json", "merges.txt")

Opened = tuple[tokenizers.Tokenizer, dict[str, str]]


def tokenizer_path(source: str) -> Path | None:
    """The folder of the tokenizer in a tokenizer, model, run or data folder, or its .json file.

    A URI is fetched to this node's cache. A path to tokenizer.json gives its folder, a path to
    another .json file just that file, and a hub id None. Raises NotOnHub for a path that does not
    exist, UserError if there is no tokenizer.
    """
    if is_uri(source):
        return _fetched(source)
    path = expanded(source)
    if is_gguf(path):
        return opened_gguf(path)
    if path.is_file():
        if path.name == "tokenizer.json":
            return path.parent
        if path.suffix == ".json":
            return path
        raise UserError(f"data.tokenizer={source}: is a file; name a folder or a tokenizer.json")
    if not path.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix == ".json":
            raise NotOnHub(f"data.tokenizer={source}: no such folder or file", "")
        return None
    holder = _holder(path)
    if holder is None:
        raise UserError(f"data.tokenizer={source}: the folder holds no tokenizer (tokenizer.json)")
    return holder


def _fetched(uri: str) -> Path:
    """The folder on this node with the tokenizer that a URI names, or its .json file."""
    folder, _, name = uri.rpartition("/")
    is_file = name.endswith(".json")
    what = "the folder holds no tokenizer (tokenizer.json)"
    try:
        path = fetched_holder(
            folder if is_file else uri,
            () if is_file else _BELOW,
            re.compile(re.escape(name)) if is_file else _TOKENIZER_FILES,
            _FETCHED,
            what=f"no {name} in it" if is_file else what,
        )
    except UserError as error:
        raise UserError(f"data.tokenizer={error}") from None
    return path / name if is_file and name != "tokenizer.json" else path


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder of a tokenizer, a model, a run or prepared data holds a tokenizer."""
    return _holder(folder) is not None


def _holder(folder: Path) -> Path | None:
    places = (folder, *(folder / name for name in _BELOW))
    return next((one for one in places if one.is_dir() and tokenizer_files(one)), None)


@cache
def hub_tokenizer(hub_id: str) -> Path:
    """The folder with a hub repository's tokenizer files.

    Raises NotOnHub if there is no such repository, UserError if it has no tokenizer.
    """
    try:
        folder = download_model(hub_id, [*_HUB_FILES])
    except NotOnHub as error:
        near = did_you_mean(nearest(hub_id.lower(), KINDS))
        raise NotOnHub(f"data.tokenizer={error}{near}", error.reason) from None
    if not tokenizer_files(folder):
        raise UserError(f"data.tokenizer={hub_id}: this hub repository has no tokenizer")
    return folder


def cached_tokenizer(hub_id: str) -> Path | None:
    """The folder of `hub_tokenizer` if it has been downloaded; works offline."""
    folder = cached_model(hub_id)
    return folder if folder and tokenizer_files(folder) else None


def tokenizer_template(source: str) -> str | None:
    """The chat template of the tokenizer that `source` names; None if it has none."""
    if source in KINDS:
        return None
    path = tokenizer_path(source) or hub_tokenizer(source)
    return template_in(path) if path.is_dir() else None


def tokenizer_files(path: Path) -> list[Path]:
    """A folder's tokenizer files; empty if it holds no tokenizer."""
    if path.is_file():
        return [path]
    named = [file for file in path.iterdir() if _TOKENIZER_FILES.fullmatch(file.name)]
    return sorted(file for file in named if file.is_file())


def tokenizer_sha256(path: Path) -> str:
    """Identity of a tokenizer folder or file: a hash of its tokenizer files' names and bytes."""
    digest = hashlib.sha256()
    for file in tokenizer_files(path):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def opens_at_once(path: Path) -> bool:
    """Whether it opens without transformers, whose import takes seconds."""
    return path.is_file() or (path / "tokenizer.json").is_file() or _is_bare_vocabulary(path)


def open_tokenizer(source: str) -> Opened:
    """Open a tokenizer; return it and the names of its special tokens, as far as it gives any.

    Raises UserError if there is none or it cannot be opened.
    """
    path = tokenizer_path(source) or hub_tokenizer(source)
    if path.is_file():
        return _from_json(path), {}
    if _is_bare_vocabulary(path):
        backend = _from_vocabulary(path)
    elif (path / "tokenizer.json").is_file():
        backend = _from_json(path / "tokenizer.json")
    else:
        return _from_transformers(str(path))
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            special |= _special_tokens(read_foreign(path / name))
    if "eos_token" not in special and (path / "config.json").is_file():
        # In a model's folder, the tokenizer's class may know its special tokens, as GPT-2's does.
        return _from_transformers(str(path))
    return backend, special


def _is_bare_vocabulary(folder: Path) -> bool:
    """Whether it has only GPT-2's two files, and nothing that says how to read them."""
    says_how = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return all((folder / name).is_file() for name in _VOCABULARY) and not any(
        (folder / name).is_file() for name in says_how
    )


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        with panics_as_errors():
            check_growth(read_object(path, most=None))
            backend = tokenizers.Tokenizer.from_file(str(path))
            check_vocabulary(backend)
            return backend
    except Locked as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: not a tokenizer: {error}") from None


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """Make a byte-level BPE of vocab.json and merges.txt, as GPT-2 does."""
    vocab, merges = (str(folder / name) for name in _VOCABULARY)
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(vocab, merges))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{folder}: no vocabulary and merges in it: {error}") from None
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - backend.get_vocab().keys()
    if missing:
        raise UserError(
            f"{folder}: without a tokenizer.json, vocab.json and merges.txt are read as "
            f"byte-level like GPT-2's, but {len(missing)} of the 256 bytes are not in the "
            "vocabulary; add a tokenizer.json"
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = [name for name in WELL_KNOWN_ENDS if backend.token_to_id(name) is not None]
    backend.add_special_tokens(known)
    return backend


def _from_transformers(source: str) -> Opened:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizer classes raise anything
        raise UserError(
            f"data.tokenizer={source}: transformers cannot open it: {first_line(error)}"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"data.tokenizer={source}: it cannot be saved as a tokenizer.json")
    return backend, _special_tokens(loaded.special_tokens_map)


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """Names of special tokens; files give them as text or as an object with `content`."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            found[name] = str(value)
    return found
