"""Finds the chat template in the folder of a tokenizer or a model."""

from __future__ import annotations

from pathlib import Path

from gptray.config import UserError
from gptray.storage.stored import Unreadable, read_bytes, read_foreign

TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_DEFAULT = "default"


def template_in(folder: Path) -> str | None:
    """The template, as Jinja source, from its own file or the tokenizer's settings.

    The default one if there are several. Raises UserError, naming a file that cannot be read.
    """
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return read_bytes(path).decode()
        except (Unreadable, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
    if not (folder / _SETTINGS).is_file():
        return None
    given = read_foreign(folder / _SETTINGS).get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get(_DEFAULT)
    return given if isinstance(given, str) else None
