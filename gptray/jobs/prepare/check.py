"""Checks a text before it is prepared: its files, its tokenizer, the rows of --dry-run.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from gptray.config import Config
from gptray.data.chats import TEXT, NoTemplate
from gptray.data.corpus import Look, chosen_columns, first_look
from gptray.data.fallback import token_words
from gptray.data.request import Request, make_request, tokenizer_name
from gptray.data.shares import split_rows
from gptray.data.sources import BUILTIN, SourceFile
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS, hub_tokenizer, opens_at_once, tokenizer_path
from gptray.data.tokens import DamagedData, TokenData
from gptray.jobs.base import Mistakes, Plan
from gptray.jobs.folders.places import check_storage
from gptray.jobs.models import TOKENIZER, locate, unknown, with_tokenizer
from gptray.jobs.progress.doing import doing
from gptray.storage.hub import NotOnHub
from gptray.wording import count, size_words

log = logging.getLogger("gptray")

_SAID_BYTES = 1 << 30  # verifying more tokens takes long enough to announce
_LOOKED_BYTES = 8 << 20  # how much text to read in full before Ray starts
_CHECKED_FILES = 100  # how many files to check before Ray starts; the scan checks all
# Finds a config's text: `make_request`, or a function for another of its texts.
FindSources = Callable[[Config], Request]


@dataclass(frozen=True)
class CheckedText:
    """A text whose files, columns and tokenizer have been checked.

    config: which text it is. column: where its rows hold it, in words; "" if there are no rows.
    """

    config: Config
    request: Request
    column: str = ""

    @cached_property
    def data(self) -> TokenData | None:
        """The prepared tokens; None if there are none yet, or files have wrong sizes."""
        return opened(self.request.data_dir)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if it is known before the text is prepared."""
        return self.data.tokenizer if self.data else tokenizer_at_once(self.config)


def check(config: Config) -> CheckedText:
    """Check the config of a prepare job. Raises UserError with all mistakes."""
    config, init_from = with_tokenizer(config), config.model.init_from
    if init_from is not None and not config.data.tokenizer:
        # The run from which the tokenizer is taken.
        found = locate(config, init_from, key="model.init_from")
        model = config.model.model_copy(update={"init_from": found})
        config = config.model_copy(update={"model": model})
    return check_text(config)


def plan(checked: CheckedText) -> Plan:
    """What the prepare job would do."""
    request, data = checked.request, checked.data
    names = dict(enumerate(request.split_names))
    rows = []
    for source, shares in request.sources:
        parts = ", ".join(f"{names[label]} {share:.1%}" for label, share in shares.items())
        rows.append((source.key.removeprefix("data."), f"{size_of(source.files)}: {parts}"))
    rows += [
        *column_row(checked),
        ("tokenizer", request.tokenizer),
        ("data_dir", str(request.data_dir)),
        ("to do", "nothing, it is already prepared" if data else "scan, tokenize, write"),
    ]
    return rows + (text_rows(data) if data else [])


def column_row(checked: CheckedText) -> Plan:
    """A plan's row for the column that holds a text, if it has rows."""
    return [("text column", checked.column)] if checked.column else []


def text_rows(data: TokenData) -> Plan:
    """A plan's rows for prepared text: its splits, warnings and what the tokenizer loses.

    Labels must be unique, since a plan is also printed as a JSON object.
    """
    rows = split_rows(data.manifest)
    if words := token_words(data.manifest):
        rows.append(("tokens", words))
    if data.manifest["warnings"]:
        rows.append(("warnings", "; ".join(data.manifest["warnings"])))
    return rows + ([("lost", data.loses)] if data.loses else [])


def size_of(files: Sequence[SourceFile]) -> str:
    """The amount of text in words: "1 file, 300.0 kB"."""
    size = size_words(sum(file.size for file in files))
    return f"{count(len(files), 'file')}, {size}" if files else BUILTIN


def check_text(config: Config, find: FindSources = make_request) -> CheckedText:
    """Check quickly what can be checked of a config's text: files, columns, tokenizer, storage.

    Logs warnings about the files. Raises UserError with all mistakes.
    """
    mistakes, request, column, opens = Mistakes(), None, "", False
    with mistakes, doing("finding the text"):
        request = find(config)
        for warning in request.warnings:
            _warn(warning)
    with mistakes:
        _check_tokenizer(config, request)
        opens = True
    if request:
        with doing("looking at the text"):
            column = _look_at_files(request, mistakes, has_tokenizer=opens)
    with mistakes:
        check_storage(config)
    mistakes.raise_any()
    assert request
    # A new request, since downloading a hub's tokenizer changes what identifies it.
    request = replace(request)
    with doing("identifying the text"):
        _ = request.identity  # it reads every file, and is kept
    return CheckedText(config, request, column)


def _check_tokenizer(config: Config, request: Request | None) -> None:
    """Raise UserError for a tokenizer that cannot be opened or downloaded.

    request: None if the text is unknown.
    """
    name = tokenizer_name(config)
    try:
        tokenizer_at_once(config)
        if name in KINDS or tokenizer_path(name) is not None:
            return
        if request is None or not request.data_dir.exists():
            hub_tokenizer(name)
    except NotOnHub as error:
        key = TOKENIZER if config.data.tokenizer else "model.init_from"
        raise unknown(config, name, error.reason, key=key) from None


def _look_at_files(request: Request, mistakes: Mistakes, *, has_tokenizer: bool) -> str:
    """Look at the files of every source; return where their rows hold the text, in words.

    has_tokenizer: whether it can be opened; if not, chats are not another mistake.
    """
    left, checked = _LOOKED_BYTES, _CHECKED_FILES
    columns: dict[str, None] = {}  # in order, each once
    for source, _ in request.sources:
        files = source.files[:checked]
        checked -= len(files)
        may_hold_text = len(files) < len(source.files)
        with_rows = next((file for file in files if file.format != "txt"), None)
        for file in files:
            # A bad row may be anywhere, and small files are quick to read.
            whole = file.compression is None and file.size <= left
            left -= file.size if whole else 0
            look = Look(has_text=True)
            with mistakes:
                try:
                    look = first_look(file, request.reading, whole=whole)
                except NoTemplate:
                    if has_tokenizer:
                        has_tokenizer = False
                        raise
                if file is with_rows:
                    columns[_column(file, request, look)] = None
            may_hold_text |= look.has_text
        if source.files and not may_hold_text:
            mistakes.add(f"{source.key} holds no text")
    return "; ".join(filter(None, columns))


def _column(file: SourceFile, request: Request, look: Look) -> str:
    """Where a file of rows holds its text, in words; logged if that was chosen."""
    names = chosen_columns(file, request.reading)
    words = " + ".join(names)
    if look.has_chats:
        words += f", as the chat template of {request.tokenizer} writes it"
    if request.reading.text_column is None and names not in ((), (TEXT,)):
        _tell(f"{file.name} has no column {TEXT!r}; reading {words}")
    return words


@lru_cache
def _tell(message: str) -> None:
    """Log once per process, as `_warn` does."""
    log.info("%s", message)


@lru_cache
def _warn(message: str) -> None:
    """Log once per process, since a sweep checks its text for each way of reading it."""
    log.warning("%s", message)


def tokenizer_at_once(config: Config) -> Tokenizer | None:
    """The config's tokenizer if it needs no text, download or transformers; otherwise None."""
    name = tokenizer_name(config)
    path = None if name in KINDS else tokenizer_path(name)
    if path is None or not opens_at_once(path):
        return None
    return Tokenizer.load(name, eos_token=config.data.eos_token)


def opened(folder: Path, *, verify: bool = False) -> TokenData | None:
    """The prepared data in a folder; None, logging it, if damaged. verify: check every byte."""
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
