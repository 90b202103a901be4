"""A spec of every key in a config tree, for checks, error messages and --help.

Built once from the tree's annotations; the tree itself is in `gptray.config`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gptray.config.suggest import did_you_mean, nearest

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys of its own",
}
_SHORT = {int: "int", float: "number", bool: "true|false", str: "text", dict: "entry"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", dict: "entries"}
_LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
}


@dataclass(frozen=True)
class FieldSpec:
    """One key: the types that it takes, its default and its description.

    items, size: if it takes a list, the types of its items and its length (None: any).
    example: the value that the message about a missing value suggests.
    """

    key: str
    kinds: tuple[type, ...]
    items: tuple[type, ...]
    size: int | None
    choices: tuple[str, ...]
    default: object
    example: object
    description: str

    @property
    def type_words(self) -> str:
        """Return the type as --help shows it, such as "int | null"."""
        words = ["|".join(self.choices)] if self.choices else []
        words += [_SHORT[kind] for kind in self.kinds if kind in _SHORT and not self.choices]
        if self.items:
            listed = [_SHORT[self.items[0]]] * (self.size or 1) + ([] if self.size else ["..."])
            words.append(f"[{', '.join(listed)}]")
        if types.NoneType in self.kinds:
            words.append("null")
        return " | ".join(words)

    def complaint(self, value: object, detail: ErrorDetails) -> str:
        """Turn one of pydantic's errors about a value into a message."""
        kind = detail["type"]
        if kind == "value_error":
            return f"{detail['ctx']['error']}, got {shown(value)}"
        if self.choices:
            options = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            close = did_you_mean(nearest(str(value), self.choices))
            return f"expects {options}, got {shown(value)}{close}"
        if kind in _LIMITS:
            limits = {
                name: f"{limit:.10g}" if isinstance(limit, float) else str(limit)
                for name, limit in detail.get("ctx", {}).items()
            }
            return f"{_LIMITS[kind].format(**limits)}, got {shown(value)}"
        expects = f"expects {self._expected()}, got {shown(value)}"
        if dict in self.kinds and isinstance(value, dict):
            return _entry_problem(value, detail["loc"][-1]) or expects
        return expects

    def _expected(self) -> str:
        words = [_WORDS[kind] for kind in self.kinds if kind in _WORDS]
        words += ["an object" for kind in self.kinds if issubclass(kind, BaseModel)]
        if self.items:
            count = f"{self.size} " if self.size else ""
            words.append(f"a list of {count}{_PLURALS[self.items[0]]}")
        if types.NoneType in self.kinds:
            words.append("null")
        return " or ".join(words)


def _entry_problem(values: Mapping[str, object], entry: object) -> str | None:
    """Say what is wrong with the entry of a mapping that pydantic names; None if it names none."""
    if entry not in values:  # its error is about another type of the union
        entry = next((name for name, one in values.items() if not isinstance(one, str)), None)
    if not isinstance(entry, str):
        return None
    if values[entry] is None:
        return f"{entry!r} has no value; put a space after the colon, as in {{name: value}}"
    return f"{entry!r} cannot be {shown(values[entry])}"


class EntryProblem(NamedTuple):
    """A problem with one entry of a key's list; `word` is the key inside the entry."""

    entry: int
    word: str | None
    message: str


class EntriesError(ValueError):
    """All problems with the entries of one key's list."""

    def __init__(self, key: str, problems: Sequence[EntryProblem]) -> None:
        lines = [f"{key}, entry {entry + 1}: {message}" for entry, _, message in problems]
        super().__init__("\n".join(lines))
        self.key = key
        self.problems = list(problems)


def complaint(root: type[BaseModel], spec: FieldSpec, value: object) -> str | None:
    """Say what is wrong with a key's value on its own; None if it is valid."""
    if isinstance(value, list) and tuple in spec.kinds:
        value = tuple(value)
    section, _, name = spec.key.rpartition(".")
    try:
        root.model_validate({section: {name: value}} if section else {name: value}, strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if ".".join(map(str, detail["loc"])).startswith(spec.key):
                return spec.complaint(value, detail)
    return None


def shown(value: object) -> str:
    """Format a value as `written`, cut to 60 characters."""
    # An empty mapping is not read for a key that takes none.
    text = "keys of its own" if value == {} else written(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def written(value: object) -> str:
    """Format a value as a config would, in one line."""
    if isinstance(value, str):
        text = f"'{value}'"
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {written(item)}' for key, item in value.items())}}}"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(written, value))}]"
    else:
        text = f"{value}"
    return text.replace("\n", "\\n")


@cache
def field_specs(root: type[BaseModel]) -> Mapping[str, FieldSpec]:
    """Return the spec of every dotted key, in the tree's order."""
    return {spec.key: spec for spec in _specs(root, "")}


def _specs(section: type[BaseModel], prefix: str) -> Iterator[FieldSpec]:
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _specs(annotation, f"{name}.")
        else:
            yield _spec(f"{prefix}{name}", info)


def _spec(key: str, info: FieldInfo) -> FieldSpec:
    kinds: list[type] = []
    items: tuple[type, ...] = ()
    size = None
    choices: list[str] = []
    for member in _members(info.annotation):
        origin = get_origin(member)
        if origin is Literal:
            choices += get_args(member)
            kinds.append(str)
        elif member is bool and choices:
            choices += ["true", "false"]
            kinds.append(bool)
        elif origin in (list, tuple):
            inside = [arg for arg in get_args(member) if arg is not Ellipsis]
            items = tuple(_runtime_class(kind) for arg in inside[:1] for kind in _members(arg))
            size = len(inside) if origin is tuple and Ellipsis not in get_args(member) else None
            kinds.append(origin)
        else:
            kinds.append(_runtime_class(member))
    default = info.get_default(call_default_factory=True)
    return FieldSpec(
        key=key,
        kinds=tuple(kinds),
        items=items,
        size=size,
        choices=tuple(choices),
        default=default,
        example=info.examples[0] if info.examples else default,
        description=info.description or "",
    )


def _runtime_class(form: object) -> type:
    """The runtime class of an annotation that is not a union: list for list[int]."""
    kind = get_origin(form) or form
    assert isinstance(kind, type), form
    return kind


def _members(annotation: object) -> Iterator[object]:
    """Flatten unions and Annotated into the plain types that a value may have."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif origin is dict:
        yield dict
    else:
        yield annotation
