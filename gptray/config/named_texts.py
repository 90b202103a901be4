"""The forms of evaluate.also: one text, a list of texts, or a mapping of names to texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from gptray.config.names import checked_name, slug
from gptray.config.values import NonEmpty

# The longest name that is made from a glob, in characters.
_MAX_NAME = 40


def named_texts(given: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """Return the texts by name; one without a name is called after its file or folder.

    Raises ValueError for an invalid name, and for two texts of one name.
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        return {_checked(name): source for name, source in given.items()}
    sources = [given] if isinstance(given, str) else given
    named: dict[str, str] = {}
    for source in sources:
        name = _name_of(source)
        if name in named:
            raise ValueError(
                f"two texts are called {name}; give them names: {{one: ..., other: ...}}"
            )
        named[name] = source
    return named


def _checked(name: str) -> str:
    try:
        return checked_name(name)
    except ValueError as error:
        raise ValueError(f"the name {name!r} {error}") from None


def _name_of(source: str) -> str:
    """The last part of a path, or the words in a glob."""
    last = source.rstrip("/").rpartition("/")[2]
    try:
        return checked_name(last)
    except ValueError:
        return slug(source, _MAX_NAME) or "text"


NamedTexts = Annotated[
    NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | dict[str, NonEmpty] | None,
    AfterValidator(lambda given: named_texts(given) or None),
    Field(
        description="other texts to score: held-out text that the model is good at shows, at "
        "every evaluation of a training, whether the model forgets; a file, folder, glob or "
        "list, or {docs: docs/*.md} to name them, in any form of data.source"
    ),
]
