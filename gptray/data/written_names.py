"""The names of special tokens where a text spells them, such as <|im_end|>."""

from __future__ import annotations

import re
from collections.abc import Mapping

# A noncharacter, which no text has, between the letters of a name that stands for itself.
_APART = "\ufdd0"


class WrittenNames:
    """Finds the names of special tokens in texts. ids: of the tokens by their names."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def parts(self, text: str) -> list[str | int]:
        """A text in pieces: the ids of tokens that it names, and the text between them."""
        found = self._pattern.split(text)  # every other one is a name
        return [self.ids[part] if i % 2 else part for i, part in enumerate(found)]

    def taken_apart(self, text: str) -> str:
        """A text in which `parts` finds no name, until it is put together again."""
        return self._pattern.sub(lambda name: _APART.join(name[0]), self.put_together(text))

    def put_together(self, text: str) -> str:
        """A text as it was before `taken_apart`."""
        return text.replace(_APART, "")
