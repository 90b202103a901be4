"""Columns of JSON values: one Arrow type if that keeps every bit, else JSON text.

A missing key becomes null; where a key is both missing and null, JSON text tells the two apart.
Numbers are 64-bit integers or doubles, as in most JSON readers; NaN and infinities, which Python
writes, are doubles too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain

import pyarrow as pa

# Marks a column that holds each value's JSON, so text is in quotes.
ENCODING, JSON = b"gptray.encoding", b"json"
# Beyond these the keys are data rather than structure, and the column becomes JSON text.
MAX_DEPTH, MAX_KEYS = 32, 1000
# Doubles represent every integer up to here exactly.
EXACT_IN_DOUBLE = 2**53

_SCALARS = {bool: pa.bool_(), float: pa.float64(), str: pa.string()}


class Shape:
    """The common type of the values at one place in all rows."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._kinds: set[type] = set()
        self._values = self._nulls = self._objects = 0
        self._low = self._high = 0
        self._is_odd = False  # no Arrow type holds all values
        self._item: Shape | None = None
        self._fields: dict[str, Shape] = {}

    def take(self, values: Sequence[object]) -> None:
        """Widen the type to hold these values."""
        kinds = set(map(type, values))
        self._values += len(values)
        if type(None) in kinds:
            self._nulls += sum(value is None for value in values)
            kinds.discard(type(None))
        self._kinds |= kinds
        if self._is_odd or not kinds:
            return
        if int in kinds:
            numbers = [value for value in values if type(value) is int]
            self._low, self._high = min(self._low, min(numbers)), max(self._high, max(numbers))
        if str in kinds:
            self._is_odd = not all(map(is_utf8, (v for v in values if type(v) is str)))
        if list in kinds:
            self._take_items([value for value in values if type(value) is list])
        if dict in kinds:
            self._take_fields([value for value in values if type(value) is dict])

    @property
    def type(self) -> pa.DataType | None:
        """The type that holds every value exactly; None if there is none."""
        kinds = self._kinds
        if self._is_odd:
            return None
        if not kinds:
            return pa.null()
        if kinds == {int}:
            return self._whole()
        if kinds == {int, float}:
            exact = self._low >= -EXACT_IN_DOUBLE and self._high <= EXACT_IN_DOUBLE
            return pa.float64() if exact else None
        (kind, *others) = kinds
        if others:
            return None
        if kind is list:
            item = self._item.type if self._item else pa.null()
            return None if item is None else pa.list_(item)
        return self._struct() if kind is dict else _SCALARS[kind]

    def _take_items(self, lists: Sequence[list[object]]) -> None:
        self._item = self._item or Shape(self._depth + 1)
        self._is_odd |= self._depth >= MAX_DEPTH
        if not self._is_odd:
            self._item.take(list(chain.from_iterable(lists)))

    def _take_fields(self, objects: Sequence[dict[str, object]]) -> None:
        self._objects += len(objects)
        new = set(chain.from_iterable(objects)) - self._fields.keys()
        wide = len(self._fields) + len(new) > MAX_KEYS
        self._is_odd |= wide or self._depth >= MAX_DEPTH or not all(map(is_utf8, new))
        if self._is_odd:
            return
        # In the order in which the keys appear.
        for key in dict.fromkeys(chain.from_iterable(objects)) if new else ():
            self._fields.setdefault(key, Shape(self._depth + 1))
        for key, shape in self._fields.items():
            shape.take([one[key] for one in objects if key in one])

    def _whole(self) -> pa.DataType | None:
        if self._low >= -(2**63) and self._high < 2**63:
            return pa.int64()
        return pa.uint64() if self._low >= 0 and self._high < 2**64 else None

    def _struct(self) -> pa.DataType | None:
        fields = [(key, shape.type) for key, shape in self._fields.items()]
        if any(one._nulls and one._values < self._objects for one in self._fields.values()):
            return None  # a null would be either a missing key or a null
        # Parquet cannot hold an object without keys.
        whole = bool(fields) and all(kind is not None for _, kind in fields)
        return pa.struct(fields) if whole else None


def json_field(name: str) -> pa.Field:
    """The field of a column that is stored as JSON text."""
    return pa.field(name, pa.string(), metadata={ENCODING: JSON})


def holds_json(field: pa.Field) -> bool:
    return bool((field.metadata or {}).get(ENCODING) == JSON)


def json_text(value: object) -> str:
    """A value as JSON; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_utf8(text) else json.dumps(value)


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
