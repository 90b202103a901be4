"""Columns of a batch's input: every type and every bit arrives, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import GenerateConfig, UserError, load_config
from gptray.data.own_columns import OWN_COLUMNS
from gptray.data.parts import unwritable, write_whole
from gptray.data.prompts import STAGED, check_input, scan, staged
from gptray.data.sources import find_files
from tests.data.parquet_kinds import KINDS

PROMPTS = pa.array(["one", "two", "three"])


def settings(*overrides: str) -> GenerateConfig:
    return load_config(None, [f"generate.{word}" for word in overrides]).generate


def through(path: Path | list[Path], *overrides: str, rows_per_part: int = 2) -> pa.Table:
    """What staging makes of files, written and read back as the output is."""
    paths = path if isinstance(path, list) else [path]
    files, chosen = find_files([str(one) for one in paths]), settings(*overrides)
    check_input(files, chosen)
    tables = []
    for number, table in enumerate(staged(files, scan(files, chosen), rows_per_part, _no_request)):
        part = paths[0].parent / "staged" / f"{number}.parquet"
        part.parent.mkdir(exist_ok=True)
        write_whole(table, part)
        tables.append(parquet.ParquetFile(part).read())
    return pa.concat_tables(tables)


def _no_request(row: Any) -> Any:
    raise AssertionError("not an OpenAI batch file")


def bits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats as the integers of their bits: NaN does not equal itself."""
    is_float = pa.types.is_float64(column.type)
    chunks = [chunk.view(pa.int64()) if is_float else chunk for chunk in column.chunks]
    return pa.chunked_array(chunks)


@pytest.mark.parametrize("name", KINDS)
def test_a_parquet_column_keeps_type_nulls_and_bits(tmp_path: Path, name: str) -> None:
    marked = pa.field("c", KINDS[name].type, metadata={"unit": "\uac1c"})
    schema = pa.schema([pa.field("prompt", pa.string(), nullable=False), marked])
    table = pa.Table.from_arrays([PROMPTS, KINDS[name]], schema=schema)
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    reader = parquet.ParquetFile(tmp_path / "p.parquet")
    groups = [reader.read_row_group(group) for group in range(reader.num_row_groups)]
    before, after = pa.concat_tables(groups), through(tmp_path / "p.parquet")
    for column in ("prompt", "c"):
        assert after.schema.field(column).equals(before.schema.field(column), check_metadata=True)
        assert bits(after[column]).equals(bits(before[column]))
    assert before["c"].null_count == KINDS[name].null_count


def test_there_are_sixty_kinds() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([]),
        pa.month_day_nano_interval(),
        pa.dense_union([pa.field("a", pa.int64())]),
        pa.timestamp("s"),
        pa.dictionary(pa.int32(), pa.int64()),
        pa.run_end_encoded(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_what_parquet_cannot_give_back_is_known_before_it_is_written(kind: pa.DataType) -> None:
    problems = unwritable([pa.field("good", pa.int64()), pa.field("bad", kind)])
    assert list(problems) == ["bad"] and str(kind) in problems["bad"]


def test_old_timestamps_arrive_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"

    def write(*values: int | None) -> None:
        table = pa.table({"prompt": PROMPTS, "t": pa.array(values, pa.timestamp("us"))})
        parquet.write_table(table, path, use_deprecated_int96_timestamps=True)

    write(1704067200123456, None, 0)
    assert through(path)["t"].cast(pa.timestamp("us")).to_pylist()[1] is None
    assert through(path)["t"].type == pa.timestamp("ns")
    write(253402300799000000, None, 0)  # the last second of 9999
    with pytest.raises(UserError, match="column 't' has INT96 timestamps before 1678 or after"):
        through(path)


def test_what_the_file_says_of_itself_is_kept(tmp_path: Path) -> None:
    table = pa.table({"prompt": PROMPTS}).replace_schema_metadata({"pandas": "{}", "mine": "1"})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert through(tmp_path / "p.parquet").schema.metadata == {b"pandas": b"{}", b"mine": b"1"}
    parquet.write_table(table.append_column("output", PROMPTS), tmp_path / "p.parquet")
    renamed = through(tmp_path / "p.parquet", "prefix=in_")
    assert renamed.schema.metadata == {b"mine": b"1"}, "pandas' words are about other names now"


def test_many_row_groups_and_large_rows_come_in_order(tmp_path: Path) -> None:
    words = pa.array([f"w{i % 7}" for i in range(500)]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array(range(501), pa.int32()), words)
    table = pa.table({"prompt": [f"row {i}" for i in range(500)], "d": words, "l": lists})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=3)
    after = through(tmp_path / "p.parquet", rows_per_part=64)
    assert after.select(["prompt", "d", "l"]).to_pylist() == table.to_pylist()
    assert after["id"].to_pylist() == list(range(500))


def test_a_part_numbers_only_the_values_that_its_rows_have(tmp_path: Path) -> None:
    kind, paths = (
        pa.dictionary(pa.int8(), pa.string()),
        [tmp_path / "a.parquet", tmp_path / "b.parquet"],
    )
    for path in paths:  # together more values than the type can number, of which rows have few
        words = pa.array([f"{path.stem}{number}" for number in range(100)])
        used = pa.DictionaryArray.from_arrays(pa.array([99, None, 7], pa.int8()), words)
        parquet.write_table(pa.table({"prompt": PROMPTS, "d": used}), path)
    after = through(paths, rows_per_part=6)["d"]
    assert after.type == kind
    assert after.to_pylist() == ["a99", None, "a7", "b99", None, "b7"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("name", OWN_COLUMNS)
def test_a_name_of_the_jobs_own_is_refused_or_gets_the_prefix(
    tmp_path: Path, name: str, suffix: str
) -> None:
    path, column = tmp_path / f"p.{suffix}", {"text": ["x", "y"], name: [1, 2]}
    if suffix == "parquet":
        parquet.write_table(pa.table(column), path)
    elif suffix == "jsonl":
        rows = ({"text": text, name: value} for text, value in zip(*column.values(), strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(f"text,{name}\nx,1\ny,2\n")
    words = ["prompt_column=text", "num_samples=2"]
    if name == "id":
        words.append("id_column=text")
    if name == "seed":
        words.append("settings_from_columns=false")
    with pytest.raises(UserError, match=rf"named '{name}'.*generate.prefix=input_ turns '{name}'"):
        through(path, *words)
    after = through(path, *words, "prefix=in_")
    expected = ["1", "2"] if suffix == "csv" else [1, 2]
    assert after[f"in_{name}"].to_pylist() == expected


def test_all_names_that_meet_are_told_at_once_with_a_prefix_that_is_free(tmp_path: Path) -> None:
    row = {"prompt": "x", "output": 1, "model": 2, "input_output": 3, "input_seed": 7}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="'output', 'model'.*generate.prefix=input1_"):
        through(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="prefix=input_: 'output' would become 'input_output'"):
        through(tmp_path / "p.jsonl", "prefix=input_")
    after = through(tmp_path / "p.jsonl", "prefix=mine_")
    assert after.column_names[len(STAGED) :] == [
        "mine_output", "mine_model", "input_output", "input_seed"
    ]  # fmt: skip


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [PROMPTS, pa.array([1, 2, 3]), pa.array([4, 5, 6])]
    table = pa.Table.from_arrays(columns, names=["prompt", "x", "x"])
    parquet.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("prompt,x,x\na,1,2\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "x": 1, "x": 2}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "m": {"x": 1, "x": 2}}\n')
    for name, message in (
        ("p.parquet", "p.parquet: several columns are named 'x'"),
        ("p.csv", "p.csv: several columns are named 'x'"),
        ("p.jsonl", "p.jsonl:1: duplicate key 'x'"),
        ("q.jsonl", "q.jsonl:2: duplicate key 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            through(tmp_path / name)


def test_files_agree_on_a_columns_type_or_are_refused(tmp_path: Path) -> None:
    def write(name: str, **columns: pa.Array) -> Path:
        parquet.write_table(pa.table({"prompt": PROMPTS, **columns}), tmp_path / name)
        return tmp_path / name

    small = write("a.parquet", n=pa.array([1, 2, 3], pa.int32()))
    none, nulls = write("b.parquet"), write("c.parquet", n=pa.nulls(3))
    after = through([nulls, none, small], rows_per_part=4)
    assert after.schema.field("n").type == pa.int32()
    assert after["n"].to_pylist() == [None] * 6 + [1, 2, 3]
    large = write("d.parquet", n=pa.array([1, 2, 3]))
    with pytest.raises(UserError, match="'n' holds int32 in .*a.parquet and int64 in .*d.parquet"):
        through([small, large])
    (tmp_path / "t.csv").write_text("prompt,n\na,1\n")
    with pytest.raises(UserError, match="'n' holds int32 in .*a.parquet and string in .*t.csv"):
        through([small, tmp_path / "t.csv"])
    (tmp_path / "j.jsonl").write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}\n')
    with pytest.raises(UserError, match="'n' holds int64 in .*d.parquet and values of several"):
        through([large, tmp_path / "j.jsonl"])


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([2**64 - 1, 1, 2], pa.uint64()),
        pa.array([3, -1, 2], pa.int8()),
        pa.array(["a", "b", "\uac00"], pa.large_string()),
        pa.array(["a", "b", "c"], pa.string_view()),
        pa.array(["a", "b", "c"]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_keep_their_type(tmp_path: Path, ids: pa.Array) -> None:
    parquet.write_table(pa.table({"prompt": PROMPTS, "key": ids}), tmp_path / "p.parquet")
    before = parquet.ParquetFile(tmp_path / "p.parquet").read()["key"]
    after = through(tmp_path / "p.parquet", "id_column=key")
    assert after["id"].type == after["key"].type == before.type
    assert after["id"].to_pylist() == after["key"].to_pylist() == before.to_pylist()


@pytest.mark.parametrize("name", ["float64", "uuid", "decimal128", "null", "bool", "struct"])
def test_ids_of_other_types_are_refused_by_name(tmp_path: Path, name: str) -> None:
    parquet.write_table(pa.table({"prompt": PROMPTS, "id": KINDS[name]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="p.parquet: the id column 'id' holds .*integers or text"):
        through(tmp_path / "p.parquet")


def test_columns_of_text_formats_are_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('id,prompt,n,seed\n007,"a, b",1,5\n8,"two\nlines",x,\n')
    after = through(tmp_path / "p.csv")
    assert after["id"].to_pylist() == ["007", "8"] and after["n"].to_pylist() == ["1", "x"]
    assert after["prompt"].to_pylist() == ["a, b", "two\nlines"]
    (tmp_path / "p.txt").write_text("first\n\nthird\r\nlast")
    after = through(tmp_path / "p.txt")
    assert after["prompt"].to_pylist() == ["first", "", "third", "last"]
    assert after["gptray.error"].null_count == 4, "an empty prompt starts a fresh document"


@pytest.mark.parametrize("name", ["p.csv", "p.parquet", "p.jsonl"])
def test_a_column_without_a_name_is_one_like_others(tmp_path: Path, name: str) -> None:
    """pandas writes its index so."""
    if name == "p.csv":
        (tmp_path / name).write_text(",prompt\n1.5,x\n")
    elif name == "p.jsonl":
        (tmp_path / name).write_text('{"": 1.5, "prompt": "x"}\n')
    else:
        parquet.write_table(pa.table({"": [1.5], "prompt": ["x"]}), tmp_path / name)
    after = through(tmp_path / name)
    assert after.schema.field("id").type == pa.int64() and after["id"].to_pylist() == [0]
    assert after[""].to_pylist() == ["1.5" if name == "p.csv" else 1.5]


def test_prompts_of_files_of_two_kinds_make_one_column(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text('{"prompt": "x"}\n{"prompt": null}\n')
    parquet.write_table(pa.table({"prompt": pa.nulls(1)}), tmp_path / "nulls.parquet")
    full = pa.schema([pa.field("prompt", pa.string(), nullable=False)])
    parquet.write_table(pa.table({"prompt": ["y"]}, schema=full), tmp_path / "full.parquet")
    for name, first in (("nulls.parquet", None), ("full.parquet", "y")):
        after = through([tmp_path / name, tmp_path / "j.jsonl"])
        assert after.schema.field("prompt").equals(pa.field("prompt", pa.string()))
        assert after["prompt"].to_pylist() == [first, "x", None]


def test_a_category_with_too_many_values_for_its_type_is_refused(tmp_path: Path) -> None:
    """Each file numbers its own values from 0; together they need more than 8 bits."""
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    for path in paths:
        words = pa.array([f"{path.stem}{number}" for number in range(100)])
        numbers = pa.array(range(100), pa.int8())
        category = pa.DictionaryArray.from_arrays(numbers, words)
        parquet.write_table(pa.table({"prompt": words, "c": category}), path)
    assert through(paths, rows_per_part=100)["c"].to_pylist()[100] == "b0"
    with pytest.raises(UserError, match="column 'c' has more values in 200 rows than its type"):
        through(paths, rows_per_part=200)
