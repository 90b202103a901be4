"""Folder names: letters and digits of any script."""

from __future__ import annotations

import unicodedata

# File systems allow 255 bytes in a name; draft files and Ray append to it.
MAX_BYTES = 200
# The folder in storage_path that holds prepared text.
PREPARED = "data"


def checked_name(name: str) -> str:
    """Return a valid folder name in NFC, so that one name is one folder everywhere.

    Raises ValueError for an invalid name.
    """
    name = unicodedata.normalize("NFC", name)
    if not name or name[0] in ".-_" or not all(c in ".-_" or _is_word_character(c) for c in name):
        raise ValueError(
            "must consist of letters and digits of any script and . _ -, and begin with a letter "
            "or digit"
        )
    if name == PREPARED:
        raise ValueError(f"must not be {PREPARED}, the folder of prepared text in storage_path")
    size = len(name.encode())
    if size > MAX_BYTES:
        raise ValueError(f"has {size} bytes, more than {MAX_BYTES}")
    return name


def slug(text: str, most: int) -> str:
    """A slug of the text for use in a name: at most `most` characters, possibly none."""
    text = unicodedata.normalize("NFC", text.lower())
    words = "".join(c if _is_word_character(c) else " " for c in text).split()
    return "-".join(words)[:most].strip("-")


def _is_word_character(character: str) -> bool:
    """Whether it is a letter, a combining mark or a digit."""
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd"
