"""What is known of a text before it is prepared: its files, its tokenizer, the rows of --dry-run.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from gptray.config import Config, override
from gptray.data.corpus import first_look
from gptray.data.fallback import token_words
from gptray.data.request import Request, make_request, tokenizer_name
from gptray.data.shares import split_rows
from gptray.data.sources import BUILTIN, SourceFile
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS, hub_tokenizer, opens_at_once, tokenizer_path
from gptray.data.tokens import DamagedData, TokenData
from gptray.hub import NotOnHub
from gptray.jobs.base import Mistakes, Plan
from gptray.jobs.models import TOKENIZER, locate, unknown, with_tokenizer
from gptray.jobs.places import check_storage
from gptray.wording import count, size_words

log = logging.getLogger("gptray")

_SAID_BYTES = 1 << 30  # of tokens: verifying more takes long enough to announce
_LOOKED_BYTES = 8 << 20  # of CSV that is read to its end before Ray starts
_CHECKED_FILES = 100  # looked into before Ray starts; the scan looks into all

# How a config's text is found: `make_request`, or one for another text of it.
FindSources = Callable[[Config], Request]


@dataclass(frozen=True)
class CheckedText:
    """A text whose files, columns and tokenizer have been checked; `config` names it."""

    config: Config
    request: Request

    @cached_property
    def data(self) -> TokenData | None:
        """Its tokens; None where they are still to be prepared, or files have wrong sizes."""
        return opened(self.request.data_dir)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, where that is known before the text is prepared."""
        return self.data.tokenizer if self.data else tokenizer_at_once(self.config)


def check(config: Config) -> CheckedText:
    """Check the config of a prepare job. Raises UserError with all that is wrong."""
    return check_text(_located(config))


def plan(checked: CheckedText) -> Plan:
    """What the prepare job would do."""
    request, data = checked.request, checked.data
    names = dict(enumerate(request.split_names))
    rows = []
    for source, shares in request.sources:
        parts = ", ".join(f"{names[label]} {share:.1%}" for label, share in shares.items())
        rows.append((source.key.removeprefix("data."), f"{size_of(source.files)}: {parts}"))
    rows += [
        ("tokenizer", request.tokenizer),
        ("data_dir", str(request.data_dir)),
        ("to do", "nothing, it is already prepared" if data else "scan, tokenise, write"),
    ]
    return rows + (text_rows(data) if data else [])


def _located(config: Config) -> Config:
    """The config with the folder of the run that it takes the tokenizer from. Raises UserError."""
    config, init_from = with_tokenizer(config), config.model.init_from
    if init_from is None or config.data.tokenizer:
        return config
    return override(config, {"model.init_from": locate(config, init_from, key="model.init_from")})


def text_rows(data: TokenData) -> Plan:
    """What a plan says of text that is prepared: its shares, what is odd, what the tokenizer loses.

    Labels differ, since a plan is also printed as a JSON object.
    """
    rows = split_rows(data.manifest)
    if words := token_words(data.manifest):
        rows.append(("tokens", words))
    if data.manifest["warnings"]:
        rows.append(("warnings", "; ".join(data.manifest["warnings"])))
    return rows + ([("lost", data.loses)] if data.loses else [])


def size_of(files: Sequence[SourceFile]) -> str:
    """How much text there is: "1 file, 300.0 kB"."""
    size = size_words(sum(file.size for file in files))
    return f"{count(len(files), 'file')}, {size}" if files else BUILTIN


def check_text(config: Config, find: FindSources = make_request) -> CheckedText:
    """Check what can be seen of a config's text at once: files, columns, tokenizer, storage.

    Logs what the user should know about the files. Raises UserError with all that is wrong.
    """
    mistakes, request = Mistakes(), None
    with mistakes:
        request = find(config)
        for warning in request.warnings:
            _warn(warning)
        _look_at_files(request, mistakes)
    with mistakes:
        _check_tokenizer(config, request)
    with mistakes:
        check_storage(config)
    mistakes.tell()
    assert request
    # Anew, since what identifies a hub's tokenizer is another thing once it is downloaded.
    return CheckedText(config, replace(request))


def _check_tokenizer(config: Config, request: Request | None) -> None:
    """Refuse a tokenizer that cannot be opened or downloaded; None: the text is not known.

    Raises UserError.
    """
    name = tokenizer_name(config)
    try:
        tokenizer_at_once(config)
        is_prepared = request is not None and request.data_dir.exists()
        if name not in KINDS and not is_prepared and tokenizer_path(name) is None:
            hub_tokenizer(name)
    except NotOnHub as error:
        key = TOKENIZER if config.data.tokenizer else "model.init_from"
        raise unknown(config, name, error.reason, key=key) from None


def _look_at_files(request: Request, mistakes: Mistakes) -> None:
    left = _LOOKED_BYTES
    files = [file for source, _ in request.sources for file in source.files]
    for file in files[:_CHECKED_FILES]:
        # A row too wide may come anywhere in a CSV file, and a small file is read in a moment.
        whole = file.format == "csv" and file.compression is None and file.size <= left
        left -= file.size if whole else 0
        with mistakes:
            first_look(file, request.reading, whole=whole)


@lru_cache
def _warn(message: str) -> None:
    """Once a process: a sweep looks at its text for every trial that changes how it is read."""
    log.warning("%s", message)


def tokenizer_at_once(config: Config) -> Tokenizer | None:
    """The config's tokenizer where it needs no text, no download and no transformers; else None."""
    name = tokenizer_name(config)
    path = None if name in KINDS else tokenizer_path(name)
    if path is None or not opens_at_once(path):
        return None
    return Tokenizer.load(name, eos_token=config.data.eos_token)


def opened(folder: Path, *, verify: bool = False) -> TokenData | None:
    """The data in a folder, or None; damage is logged. verify: check every byte."""
    if not os.path.lexists(folder):
        return None
    try:
        data = TokenData.open(folder)
        if verify:
            if data.num_bytes > _SAID_BYTES:
                log.info("verifying %.1f GB of prepared data", data.num_bytes / 1e9)
            data.verify()
        return data
    except DamagedData as error:
        log.warning("prepared data is damaged and will be built again: %s", error)
        return None
