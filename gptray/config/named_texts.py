"""Texts by name, as evaluate.also takes them: one, a list of them, or names with a text each."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from gptray.config.names import checked_name, label_of
from gptray.config.values import NonEmpty

# Characters of a name that is made of a glob.
_MOST = 40


def named_texts(given: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """The texts by name; those without one are called by their file or folder.

    Raises ValueError for a name that cannot be one, and for two texts of one name.
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
    """The last part of a path; of a glob, the words in it."""
    last = source.rstrip("/").rpartition("/")[2]
    try:
        return checked_name(last)
    except ValueError:
        return label_of(source, _MOST) or "text"


NamedTexts = Annotated[
    NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | dict[str, NonEmpty] | None,
    AfterValidator(lambda given: named_texts(given) or None),
    Field(
        description="other texts to score: held-out text that the model is good at shows, at "
        "every evaluation of a training, whether the model forgets; a file, folder, glob or "
        "list, or {docs: docs/*.md} to name them, in any form of data.source"
    ),
]
