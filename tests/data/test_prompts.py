"""Rows of prompts: every format, every column, and who is to blame for what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import UserError
from gptray.data.prompts import check_columns, passed_name, prompt_problem, read_rows, scan, staged
from gptray.data.sources import find_files

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "n": 1, "tags": ["a"]},
    {"prompt": '\uc61b\ub0a0, "two"\nlines', "n": None, "tags": []},
    {"prompt": None, "n": 3, "tags": None},
]


def read_all(path: Path, column: str = "prompt", id_column: str | None = None) -> list[Any]:
    files = find_files(str(path))
    found = scan(files, column, id_column)
    tables = list(staged(files, column, found, 2))
    assert all(table.num_rows <= 2 for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.jsonl.gz"])
def test_rows_keep_their_order_and_all_their_columns(tmp_path: Path, name: str) -> None:
    if name.endswith(".gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        write(tmp_path / name, ROWS)
    rows = read_all(tmp_path / name)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["prompt"] for row in rows] == ["one", ROWS[1]["prompt"], None]
    assert [row["error"] for row in rows] == [None, None, "the prompt is null"]
    assert [(row["n"], row["tags"]) for row in rows] == [(r["n"], r["tags"]) for r in ROWS]


def test_csv_and_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('question,n\n"a, b",1\n"two\nlines",x\n')
    rows = read_all(tmp_path / "p.csv", "question")
    assert [(row["prompt"], row["question"], row["n"]) for row in rows] == [
        ("a, b", "a, b", "1"),
        ("two\nlines", "two\nlines", "x"),
    ]
    (tmp_path / "p.txt").write_text("first\n\nthird\r\nlast")
    rows = read_all(tmp_path / "p.txt")
    assert [row["prompt"] for row in rows] == ["first", "", "third", "last"]
    assert rows[1]["error"] == "the prompt is empty"


def test_ids_come_from_the_column_id_or_the_one_that_is_named(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "key": 10 - i, "prompt": "x"} for i in range(3)]
    write(tmp_path / "p.jsonl", rows)
    assert [row["id"] for row in read_all(tmp_path / "p.jsonl")] == ["r0", "r1", "r2"]
    named = read_all(tmp_path / "p.jsonl", id_column="key")
    assert [(row["id"], row["input_id"]) for row in named] == [(10, "r0"), (9, "r1"), (8, "r2")]


@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, 1], [1, "1"], [1, None]])
def test_ids_that_are_twice_or_missing_are_refused(tmp_path: Path, ids: list[Any]) -> None:
    write(tmp_path / "p.jsonl", [{"id": name, "prompt": "x"} for name in ids])
    with pytest.raises(UserError, match=f"p.jsonl:{len(ids)}: .*id"):
        read_all(tmp_path / "p.jsonl")


def test_columns_of_the_same_name_as_ours_are_kept_under_another(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "x", "output": 7, "seed": 3}])
    row = read_all(tmp_path / "p.jsonl")[0]
    assert row["input_output"] == 7 and row["input_seed"] == 3
    assert passed_name("topic") == "topic"


def test_values_without_a_common_type_become_text(tmp_path: Path) -> None:
    values = [1, "two", {"three": 3}, 2**80]
    write(tmp_path / "p.jsonl", [{"prompt": "x", "v": value} for value in values])
    got = [row["v"] for row in read_all(tmp_path / "p.jsonl")]
    assert got == ["1", "two", '{"three": 3}', str(2**80)]
    write(tmp_path / "q.jsonl", [{"prompt": "x", "v": value} for value in (1, 2.5, None)])
    assert [row["v"] for row in read_all(tmp_path / "q.jsonl")] == [1.0, 2.5, None]


@pytest.mark.parametrize(
    ("value", "problem"),
    [(None, "null"), ("", "empty"), (5, "no text"), (["a"], "no text"), ("a\ud800", "surrogate")],
)
def test_a_prompt_that_cannot_run_says_why(value: Any, problem: str) -> None:
    assert problem in (prompt_problem(value) or "")
    assert prompt_problem("fine ") is None


def test_a_lone_surrogate_harms_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\ud800b", "x": "\\udc00"}\n{"prompt": "c"}\n')
    rows = read_all(tmp_path / "p.jsonl")
    assert rows[0]["prompt"] == "a\ufffdb" and rows[0]["x"] == "\ufffd"
    assert "surrogate" in rows[0]["error"] and rows[1]["error"] is None


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    lines = ['{"prompt": "x"}'] * 6000
    lines[5000] = '{"prompt": "x"'
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"p.jsonl:5001: not JSON"):
        read_all(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_wrong_column_is_refused_with_those_that_there_are(tmp_path: Path, name: str) -> None:
    (file,) = find_files(str(write(tmp_path / name, [{"promt": "x", "n": 1}])))
    with pytest.raises(UserError, match=r"no column 'prompt'.*promt.*generate.prompt_column"):
        check_columns(file, "prompt")


def test_a_column_of_numbers_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": 1}])
    with pytest.raises(UserError, match="int64, not text"):
        check_columns(find_files(str(path))[0], "prompt")
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        check_columns(find_files(str(path))[0], "prompt")


def test_places_count_lines(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt\n"two\nlines"\nlast\n')
    places = [place for place, _ in read_rows(find_files(str(tmp_path / "p.csv"))[0], "prompt")]
    assert [place.rpartition(":")[2] for place in places] == ["2", "4"]
