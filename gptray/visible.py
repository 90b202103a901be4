"""Escapes control characters in text for a terminal.

File names, prompts, generated text and tokens may come from anybody; an escape sequence in them
could clear the screen, write to the clipboard or hide part of a line.
"""

from __future__ import annotations

import re

# Control characters except newline and tab, and those that change the text's direction.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with control characters escaped, as \x1b; \n and \t stay."""
    return _COMMANDS.sub(_escaped, text)


def visible_json(text: str) -> str:
    r"""JSON with the control characters that json.dumps leaves, escaped as \u009b; still equal."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
