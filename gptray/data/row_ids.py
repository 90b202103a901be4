"""Checks the ids of rows: integers or text, none missing, all unique (1 and "1" are equal)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gptray.config import UserError
from gptray.data.batches import Batch
from gptray.data.json_columns import is_utf8
from gptray.data.rows import is_text


class Ids:
    """The ids of all rows as 64-bit hashes: 8 bytes a row, however long the ids are."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._hashes: list[NDArray[np.int64]] = []
        self._problem: str | None = None

    def take(self, batch: Batch) -> None:
        ids = batch.values(self._column)
        if self._problem is None:
            wrong = (row for row, name in enumerate(ids) if not _is_name(name))
            row = next(wrong, None)
            self._problem = None if row is None else self._complaint(batch.place(row), ids[row])
        hashes = (hash(str(name)) for name in ids)
        self._hashes.append(np.fromiter(hashes, np.int64, len(ids)))

    def check(self, again: Callable[[], Iterable[Batch]]) -> None:
        """Raise UserError for the first id that is missing, neither integer nor text, or duplicate.

        `again` reads all rows once more; it is called only if hashes collide.
        """
        if self._problem is not None:
            raise UserError(self._problem)
        hashes = np.sort(np.concatenate([np.empty(0, np.int64), *self._hashes]))
        equal = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not len(equal):
            return
        seen: dict[str, str] = {}
        for number, batch in enumerate(again()):
            suspects = np.flatnonzero(np.isin(self._hashes[number], equal))
            ids = batch.values(self._column) if len(suspects) else []
            for row in suspects.tolist():
                name, place = ids[row], batch.place(row)
                if str(name) in seen:
                    raise UserError(
                        f"{place}: the id {name!r} in column {self._column!r} is also at "
                        f"{seen[str(name)]}; every row needs its own id"
                    )
                seen[str(name)] = place

    def _complaint(self, place: str, name: object) -> str:
        shown = "null" if name is None else repr(name)[:60]
        if type(name) is str:
            shown += ", which holds half a surrogate pair"
        return f"{place}: the id in column {self._column!r} is {shown}; {_ADVICE}"


def _is_name(value: object) -> bool:
    return type(value) is int or (type(value) is str and is_utf8(value))


def check_id_type(name: str, kind: pa.DataType, source: str) -> None:
    """Raise UserError for a column whose values cannot be ids."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not pa.types.is_integer(plain) and not is_text(kind):
        raise UserError(f"{source}: the id column {name!r} holds {kind}; {_ADVICE}")


_ADVICE = "ids are integers or text: convert it, or choose another column with generate.id_column"
