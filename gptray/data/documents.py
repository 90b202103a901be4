"""Documents of plain text files (.txt, .md): one per file, or one between separators.

They come in parts as the text is read, so that no document is held whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gptray.data.boundary import last_boundary
from gptray.data.written_names import put_together

_LONGEST_PART = 1 << 20  # characters


class Part(NamedTuple):
    """A stretch of a document's text; `ends` is true for the last. `Part("", True)`: empty row.

    is_chat: a chat template wrote the text, so it is for `Tokenizer.chat_ids`.
    """

    text: str
    ends: bool
    is_chat: bool = False

    @property
    def shown(self) -> str:
        """The text as it reads."""
        return put_together(self.text) if self.is_chat else self.text


EMPTY_ROW = Part("", True)


def one_document(texts: Iterable[str], *, begins: bool, ends: bool) -> Iterator[Part]:
    """The parts of a document, or of a piece of one; it may begin or end the document."""
    held = ""
    for text in texts:
        held += text
        cut = _ready(held, len(held))
        if cut:
            yield Part(held[:cut], False)
            held, begins = held[cut:], False
    if ends:
        # White space alone is not a document.
        yield EMPTY_ROW if begins and not held.strip() else Part(held, True)
    elif held:
        yield Part(held, False)


def split_documents(texts: Iterable[str], separator: str) -> Iterator[Part]:
    """The documents between separators, stripped of white space; empty ones are dropped."""
    kept = len(separator) - 1  # characters at the end that may begin a separator
    held, fresh = "", True
    for text in texts:
        held += text
        *whole, held = held.split(separator)
        for document in whole:
            yield from _closed(document, fresh)
            fresh = True
        tail = max(len(held) - kept, 0)
        if fresh:
            head = held[:tail].lstrip()
            held, tail = head + held[tail:], len(head)
        cut = _ready(held, len(held[:tail].rstrip()))
        if cut:
            yield Part(held[:cut], False)
            held, fresh = held[cut:], False
    yield from _closed(held, fresh)


def _closed(text: str, fresh: bool) -> Iterator[Part]:
    text = text.strip() if fresh else text.rstrip()
    if text:
        yield Part(text, True)


def _ready(held: str, stop: int) -> int:
    """How much of held[:stop] can be passed on: never all, as the last part is marked.

    Long text without a boundary is passed on too.
    """
    return last_boundary(held[:stop]) or (stop - 1 if stop > _LONGEST_PART else 0)
