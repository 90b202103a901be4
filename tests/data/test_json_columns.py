"""Columns of JSON rows: one type where it holds every value to the bit, else JSON text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gptray.config import UserError
from gptray.data.json_columns import MAX_KEYS, holds_json
from tests.data.test_columns import through

BIG = 2**53 + 1
LATER = 1025  # in another batch than the first row


def column(tmp_path: Path, *values: Any, later: int = 1) -> tuple[pa.Field, list[Any]]:
    """The field that values of `c` get, and they themselves; the first stands `later` times."""
    rows = [{"prompt": "x", "c": values[0]}] * later
    rows += [{"prompt": "x", "c": value} for value in values[1:]]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = through(path, rows_per_part=4096)
    return table.schema.field("c"), table["c"].to_pylist()[later - 1 :]


@pytest.mark.parametrize("later", [1, LATER])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, -(2**63)], pa.int64()),
        ([1, 2**63], pa.uint64()),
        ([1, 2.5], pa.float64()),
        ([2**53, 2.5, -(2**53)], pa.float64()),
        ([True, None], pa.bool_()),
        ([None, None], pa.null()),
        (["a", "\uc61b\ub0a0", ""], pa.string()),
        ([[], []], pa.list_(pa.null())),
        ([[1], [None, 2], None], pa.list_(pa.int64())),
        ([{"x": 1}, {"x": None}], pa.struct([("x", pa.int64())])),
        ([[{"x": [1.5]}], []], pa.list_(pa.struct([("x", pa.list_(pa.float64()))]))),
        ([{"": 1}, {"": 2}], pa.struct([("", pa.int64())])),
    ],
    ids=str,
)
def test_values_of_one_type_have_it(
    tmp_path: Path, values: list[Any], kind: pa.DataType, later: int
) -> None:
    field, got = column(tmp_path, *values, later=later)
    assert field.type == kind and got == values and not field.metadata


@pytest.mark.parametrize("later", [1, LATER])
@pytest.mark.parametrize(
    "values",
    [
        [BIG, 1.5],
        [-BIG, 1.5],
        [1, 2**64],
        [-1, 2**63],
        [10**30, 1],
        [1, "1"],
        [True, 1],
        [1, [1]],
        [[1], {"x": 1}],
        [{}, {}],
        [{"x": {}}, {"x": {}}],
        [[{}], []],
        [{}, {"k": None}, {"k": 1}],
        [{"k": 1}, None, {"k": None}, {}],
        [[{"k": {"x": 1}}, {"k": None}], [{}]],
        [{"x": 1.5}, {"x": "t"}],
        [[1], ["a"]],
        ["\ud800", "x"],
        [{"\udc00": 1}, {"x": 1}],
        [{"x": {"y": [1, "\ud800"]}}, None],
    ],
    ids=str,
)
def test_values_without_one_are_json_text(tmp_path: Path, values: list[Any], later: int) -> None:
    field, got = column(tmp_path, *values, later=later)
    assert field.type == pa.string() and holds_json(field)
    assert [None if text is None else json.loads(text) for text in got] == values


def test_a_missing_key_is_null_where_no_other_null_is(tmp_path: Path) -> None:
    field, got = column(tmp_path, {"x": 1}, {"y": "t"}, {}, None)
    assert field.type == pa.struct([("x", pa.int64()), ("y", pa.string())])
    assert got == [{"x": 1, "y": None}, {"x": None, "y": "t"}, {"x": None, "y": None}, None]


def test_numbers_beyond_json_are_doubles(tmp_path: Path) -> None:
    field, got = column(tmp_path, math.nan, math.inf, 1)
    assert field.type == pa.float64() and math.isnan(got[0]) and got[1:] == [math.inf, 1.0]


def test_objects_that_are_data_or_too_deep_are_json_text(tmp_path: Path) -> None:
    wide = [{f"user {i}": i} for i in range(MAX_KEYS + 1)]
    field, got = column(tmp_path, *wide)
    assert holds_json(field) and json.loads(got[-1]) == wide[-1]
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    field, got = column(tmp_path, deep)
    assert holds_json(field) and json.loads(got[0]) == deep


def test_the_whole_of_it_is_told_once_by_name(tmp_path: Path) -> None:
    from gptray.config import load_config
    from gptray.data.prompts import scan
    from gptray.data.sources import find_files

    rows = [{"id": 1, "prompt": "x", "a": {}, "b": 1}, {"id": "2", "prompt": "y", "a": 1, "b": 2}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scan(find_files(str(tmp_path / "p.jsonl")), load_config(None, []).generate)
    assert found.columns.notes == [
        "columns whose values fit no single type are stored as JSON text: a",
        "the ids in column 'id' are stored as text",
    ]


def test_half_a_surrogate_pair_in_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "\\ud800", "prompt": "y"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: the id .*\\ud800.* half a surrogate pair"):
        through(path)
    path.write_text('{"prompt": "x"}\n{"prompt": "y", "\\ud800": 1}\n')
    with pytest.raises(UserError, match=r"p.jsonl: column '\\ud800': its name holds half a"):
        through(path)
