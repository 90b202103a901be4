"""Finds the end-of-text token of an opened tokenizer: as named somewhere, or a well-known one."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import tokenizers

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.data.tokenizer_files import WELL_KNOWN_ENDS, Opened, hub_tokenizer, tokenizer_path
from gptray.storage.stored import is_whole, read_foreign

log = logging.getLogger("gptray")

_CONFIG = "config.json"
_SHOWN = 6  # tokens that an error proposes


def end_of_text(opened: Opened, source: str, *, asked: str | None) -> str:
    """The end-of-text token: as asked for, as named by the tokenizer or its model's config, or a
    well-known one.

    Raises UserError, naming data.eos_token and candidates, if there is none.
    """
    backend, special = opened
    if asked is not None:
        if backend.token_to_id(asked) is None:
            near = nearest(asked, backend.get_vocab(with_added_tokens=True))
            raise UserError(
                f"data.eos_token={asked!r} is not in the vocabulary of {source}"
                f"{did_you_mean(*([repr(near)] if near else _candidates(backend)))}"
            )
        return _made_special(backend, asked)
    if (named := special.get("eos_token")) is not None:
        if backend.token_to_id(named) is None:
            raise UserError(
                f"data.tokenizer={source}: its eos_token {named!r} is not in its vocabulary; "
                f"choose one with data.eos_token{_such_as_candidates(backend)}"
            )
        return named
    folder = tokenizer_path(source) or hub_tokenizer(source)
    if (of_model := _end_of_model(folder, backend)) is not None:
        return _made_special(backend, of_model)
    known = [name for name in WELL_KNOWN_ENDS if name in _added(backend)]
    if len(known) != 1:
        raise _no_end(backend, folder, source)
    _warn_once(
        f"data.tokenizer={source} names no end-of-text token; using {known[0]!r} (set "
        "data.eos_token to choose another)"
    )
    return known[0]


def _no_end(backend: tokenizers.Tokenizer, folder: Path, source: str) -> UserError:
    such = _such_as_candidates(backend)
    if (folder / _CONFIG).is_file():  # a model's, which jobs that train nothing open too
        return UserError(
            f"{source}: neither its tokenizer nor its {_CONFIG} names an end-of-text token; "
            f"give its tokenizer_config.json an eos_token{such}"
        )
    return UserError(
        f"data.tokenizer={source}: names no end-of-text token; choose one with data.eos_token{such}"
    )


def _made_special(backend: tokenizers.Tokenizer, name: str) -> str:
    """Make a token of the vocabulary special: it keeps its id, its name in text is plain text."""
    backend.add_special_tokens([name])
    return name


def _end_of_model(folder: Path, backend: tokenizers.Tokenizer) -> str | None:
    """The first end-of-text token in a model's config, if the folder holds one."""
    configs = (folder / name for name in ("generation_config.json", _CONFIG))
    for path in filter(Path.is_file, configs):
        given = read_foreign(path).get("eos_token_id")
        number = next(iter(given), None) if isinstance(given, list) else given
        if is_whole(number):
            token: str | None = backend.id_to_token(number)
            return token
    return None


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _candidates(backend: tokenizers.Tokenizer) -> list[str]:
    """Tokens that may end a text: well-known names in the vocabulary, and special tokens."""
    known = [name for name in WELL_KNOWN_ENDS if backend.token_to_id(name) is not None]
    return list(dict.fromkeys([*known, *_added(backend)]))[:_SHOWN]


def _such_as_candidates(backend: tokenizers.Tokenizer) -> str:
    listed = " or ".join(map(repr, _candidates(backend)))
    return f", such as {listed}" if listed else ""


def _added(backend: tokenizers.Tokenizer) -> list[str]:
    """The special added tokens, by id."""
    added = backend.get_added_tokens_decoder()
    return [token.content for _, token in sorted(added.items()) if token.special]
