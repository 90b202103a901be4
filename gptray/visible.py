"""Text for a terminal: what would command it is shown instead.

File names, prompts, generated text and tokens are other people's; an escape sequence in one could
clear the screen, write to the clipboard or hide what a line says.
"""

from __future__ import annotations

import re

# Control characters but for line break and tab, and those that turn the direction of text.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with its control characters written out, as \x1b; \n and \t stay."""
    return _COMMANDS.sub(_written_out, text)


def visible_json(text: str) -> str:
    r"""A JSON text with what its writer leaves of them as \u009b: it still means the same."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _written_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
