"""Finds the names of special tokens, such as <|im_end|>, in texts."""

from __future__ import annotations

import re
from collections.abc import Mapping

# A noncharacter, which no text has; between a name's letters it keeps the name plain text.
_APART = "\ufdd0"


def put_together(text: str) -> str:
    """The text before `WrittenNames.taken_apart`."""
    return text.replace(_APART, "")


class WrittenNames:
    """Finds the names of special tokens in texts. ids: the tokens' ids by name."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def parts(self, text: str) -> list[str | int]:
        """Split a text at the names of special tokens: their ids, and the text between them."""
        found = self._pattern.split(text)  # every other one is a name
        return [self.ids[part] if i % 2 else part for i, part in enumerate(found)]

    def taken_apart(self, text: str) -> str:
        """Escape a text so that `parts` finds no name in it; `put_together` reverses it."""
        return self._pattern.sub(lambda name: _APART.join(name[0]), put_together(text))
