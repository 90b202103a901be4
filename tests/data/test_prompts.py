"""Rows of prompts: every format, ids, settings, and who is to blame for what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import ConfigError, GenerateConfig, UserError, load_config
from gptray.data.prompts import check_input, prompt_problem, scan
from gptray.data.sources import find_files
from tests.data.test_columns import settings, through

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "n": 1, "tags": ["a"]},
    {"prompt": '\uc61b\ub0a0, "two"\nlines', "n": None, "tags": []},
    {"prompt": None, "n": 3, "tags": None},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_settings(table: pa.Table) -> list[Any]:
    return [text and json.loads(text) for text in table["gptray.settings"].to_pylist()]


def notes(path: Path, *overrides: str) -> list[str]:
    return scan(find_files(str(path)), settings(*overrides)).columns.notes


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.jsonl.gz"])
def test_rows_keep_their_order_and_all_their_columns(tmp_path: Path, name: str) -> None:
    if name.endswith(".gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        write(tmp_path / name, ROWS)
    table = through(tmp_path / name)
    assert table["id"].to_pylist() == [0, 1, 2]
    assert table["gptray.error"].to_pylist() == [None, None, "the prompt is null"]
    assert table.select(["prompt", "n", "tags"]).to_pylist() == ROWS


def test_another_prompt_column_passes_through_as_well(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"question": "a", "n": 1}, {"question": 7, "n": 2}])
    table = through(tmp_path / "p.jsonl", "prompt_column=question")
    assert table["prompt"].to_pylist() == ["a", "7"]
    assert table["question"].to_pylist() == ['"a"', "7"]
    assert table["gptray.error"].to_pylist() == [
        None,
        "the prompt must be text or token ids, got a number",
    ]


def test_ids_come_from_the_column_id_or_the_one_that_is_named(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "key": 10 - i, "prompt": "x"} for i in range(3)]
    path = write(tmp_path / "p.jsonl", rows)
    assert through(path)["id"].to_pylist() == ["r0", "r1", "r2"]
    named = through(path, "id_column=key", "prefix=in_")
    assert named["id"].to_pylist() == named["key"].to_pylist() == [10, 9, 8]
    assert named["in_id"].to_pylist() == ["r0", "r1", "r2"]
    with pytest.raises(UserError, match=r"no column 'kee'; columns: key.*generate.id_column"):
        through(path, "id_column=kee")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, 1], [1, "1"], [1, None], [1, 2.5], [True]])
def test_ids_that_are_twice_or_no_names_are_refused(
    tmp_path: Path, ids: list[Any], name: str
) -> None:
    rows = [{"id": id_, "prompt": "x"} for id_ in ids]
    if name == "p.parquet" and ids in ([1, "1"], [1, 2.5], [True]):
        return  # one type, which is looked at as a whole
    place = "p.jsonl:" if name == "p.jsonl" else "p.parquet: row "
    with pytest.raises(UserError, match=f"{place}{len(ids)}: .*id.* column 'id'"):
        through(write(tmp_path / name, rows))


def test_a_duplicate_id_is_found_among_many_and_both_places_are_named(tmp_path: Path) -> None:
    rows = [{"id": i if i != 4321 else 17, "prompt": "x"} for i in range(5000)]
    with pytest.raises(UserError, match=r"p.jsonl:4322: the id 17 .* also at .*p.jsonl:18;"):
        through(write(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        ([2**64 - 1, 2], pa.uint64(), [2**64 - 1, 2]),
        ([-1, 2], pa.int64(), [-1, 2]),
        ([1, "two"], pa.string(), ["1", "two"]),
        ([10**30, 2], pa.string(), [str(10**30), "2"]),
    ],
)
def test_ids_of_json_rows(
    tmp_path: Path, ids: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    table = through(write(tmp_path / "p.jsonl", [{"id": one, "prompt": "x"} for one in ids]))
    assert table["id"].type == kind and table["id"].to_pylist() == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "the prompt is null"),
        (5, "the prompt must be text or token ids, got a number"),
        (["a"], "the prompt must be text or token ids, got a list"),
        ([1, True], "the prompt must be text or token ids, got a list"),
        ([1, 2.0], "the prompt must be text or token ids, got a list"),
        ("a\ud800", "the prompt holds half a surrogate pair"),
    ],
)
def test_a_prompt_that_cannot_run_says_why(value: Any, problem: str) -> None:
    assert prompt_problem(value) == problem
    assert prompt_problem("fine ") is None and prompt_problem("") is None


def test_a_lone_surrogate_harms_its_row_only_and_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\ud800b", "x": "\\udc00"}\n{"prompt": "c"}\n')
    table = through(tmp_path / "p.jsonl")
    assert table["prompt"].to_pylist() == [r'"a\ud800b"', "c"]
    assert table["x"].to_pylist() == [r'"\udc00"', None]
    assert table["gptray.error"].to_pylist() == ["the prompt holds half a surrogate pair", None]


def test_settings_of_a_row_are_read_and_pass_through(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "temperature": 0.5, "top_k": 3, "stop": "end", "seed": 7},
        {"prompt": "x", "temperature": None, "top_k": None, "stop": ["a", "b"], "seed": None},
        {"prompt": "x", "temperature": "hot", "top_k": 1.5, "stop": {"a": 1}, "seed": 8, "utf8": 2},
    ]
    table = through(write(tmp_path / "p.jsonl", rows))
    own = [{"temperature": 0.5, "top_k": 3, "stop": ["end"], "seed": 7}, {"stop": ["a", "b"]}]
    assert own_settings(table) == [*own, {"seed": 8}]
    assert table["gptray.error"].to_pylist()[:2] == [None, None]
    for problem in (
        "temperature='hot' is not a number",
        "top_k=1.5 is not a whole number",
        "stop",
        "utf8=2 is not true or false",
    ):
        assert problem in table["gptray.error"][2].as_py()
    assert table["top_k"].to_pylist() == [3.0, None, 1.5]
    assert "seed" not in table.column_names, "it becomes the output's own"


@pytest.mark.parametrize("name", ["top_k", "temperature"])
def test_numbers_in_text_are_plain_decimals(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.csv").write_text(f"prompt,{name}\nx, 5\nx,1_0\nx,\uff15\nx,5.0\n", "utf-8")
    table = through(tmp_path / "p.csv")
    assert own_settings(table) == [{name: 5}, None, None, {name: 5}]
    kind = "a whole number" if name == "top_k" else "a number"
    assert table["gptray.error"][1].as_py() == f"{name}='1_0' is not {kind}"


def test_settings_are_read_only_where_the_config_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "temperature": 21.5, "stop": "Main St", "seed": 3}]
    path = write(tmp_path / "p.jsonl", rows)
    (told,) = notes(path, "prefix=in_")
    assert told.startswith("columns that set how their row is sampled: temperature, stop, seed; ")
    assert notes(path, "settings_from_columns=[seed]") == []
    none = through(path, "settings_from_columns=false", "prefix=in_")
    assert own_settings(none) == [None]
    assert none.select(["temperature", "stop", "in_seed"]).to_pylist() == [
        {"temperature": 21.5, "stop": "Main St", "in_seed": 3}
    ]
    some = through(path, "settings_from_columns=[seed]")
    assert own_settings(some) == [{"seed": 3}]
    both = through(path, "prefix=in_")
    assert own_settings(both)[0]["seed"] == 3 and both["in_seed"].to_pylist() == [3]
    with pytest.raises(ConfigError, match="temprature is not a setting .* mean temperature"):
        load_config(None, ["generate.settings_from_columns=[temprature]"])
    with pytest.raises(UserError, match=r"no column 'top_k'.*settings_from_columns"):
        through(path, "settings_from_columns=[seed, top_k]")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_seed_that_integers_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"prompt": "x", "seed": 1.5}, {"prompt": "x", "seed": 2.0}])
    with pytest.raises(UserError, match="column 'seed' holds double.*generate.prefix=input_"):
        through(path)
    table = through(path, "prefix=input_")
    assert own_settings(table) == [None, {"seed": 2}]
    assert table["input_seed"].to_pylist() == [1.5, 2.0]
    (tmp_path / "p.csv").write_text("prompt,seed\nx,5.0\nx,\nx,five\n")
    table = through(tmp_path / "p.csv")
    assert own_settings(table) == [{"seed": 5}, None, None], "5.0 is how pandas writes it"
    assert table["gptray.error"][2].as_py() == "seed='five' is not a whole number"


def test_a_type_that_never_is_a_setting_is_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x"], "temperature": pa.array([1], pa.timestamp("us"))})
    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match="'temperature' holds timestamp.*settings_from_columns"):
        through(tmp_path / "p.parquet")
    after = through(tmp_path / "p.parquet", "settings_from_columns=false")
    assert after["temperature"].type == pa.timestamp("us")


def test_a_near_miss_is_told_once(tmp_path: Path) -> None:
    row = {"prompt": "x", "max_tokens": 2, "temp": 1, "topk": 1, "n": 3, "topic": "t", "score": 1}
    path = write(tmp_path / "p.jsonl", [row, row])
    assert notes(path) == [
        "column 'max_tokens' is passed through; did you mean max_new_tokens?",
        "column 'temp' is passed through; did you mean temperature?",
        "column 'topk' is passed through; did you mean top_k?",
        "column 'n' is passed through; did you mean generate.num_samples?",
    ]
    assert notes(path, "settings_from_columns=false") == []


def test_settings_that_no_row_has_are_told_in_one_line(tmp_path: Path) -> None:
    row = {"prompt": "x", "logit_bias": {"5": 1}, "presence_penalty": 0.5, "bias": 1}
    path = write(tmp_path / "p.jsonl", [row, row])
    assert notes(path) == [
        "columns that are passed through without effect, since a row cannot set them: "
        "logit_bias, presence_penalty"
    ]
    assert notes(path, "settings_from_columns=false") == []
    table = through(path)
    assert table["presence_penalty"].to_pylist() == [0.5, 0.5]


def test_an_input_without_rows_has_its_columns(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,prompt,n\n")
    table = through(tmp_path / "p.csv")
    assert table.num_rows == 0 and table.schema.field("n").type == pa.string()
    (tmp_path / "p.jsonl").write_text("")
    assert through(tmp_path / "p.jsonl").schema.field("id").type == pa.int64()
    empty = pa.table({"prompt": pa.array([], pa.string()), "f": pa.array([], pa.float16())})
    parquet.write_table(empty, tmp_path / "p.parquet")
    assert through(tmp_path / "p.parquet").schema.field("f").type == pa.float16()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    lines = ['{"prompt": "x"}'] * 6000
    lines[5000] = '{"prompt": "x"'
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"p.jsonl:5001: not JSON"):
        through(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.csv"])
def test_a_wrong_column_is_refused_with_those_that_there_are(tmp_path: Path, name: str) -> None:
    if name == "p.csv":
        (tmp_path / name).write_text("promt,n\nx,1\n")
    else:
        write(tmp_path / name, [{"promt": "x", "n": 1}])
    with pytest.raises(UserError, match=r"no column 'prompt'.*promt.*generate.prompt_column"):
        check_input(find_files(str(tmp_path / name)), settings())


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": 1}])
    with pytest.raises(UserError, match="'prompt' holds int64, not text"):
        through(path)
    write(path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        through(path)
    raw = pa.array([b"ok", b"\xff"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": raw, "x": raw}), path)
    with pytest.raises(UserError, match="p.parquet: row 2: column 'prompt' is not UTF-8"):
        notes(path)
    parquet.write_table(pa.table({"prompt": ["a", "b"], "x": raw}), path)
    assert through(path)["x"].cast(pa.binary()).to_pylist() == [b"ok", b"\xff"]


def test_places_count_lines(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,id\n"two\nlines",1\nlast,1\n')
    with pytest.raises(UserError, match=r"p.csv:4: the id '1' .* also at .*p.csv:2"):
        through(tmp_path / "p.csv")


def test_rows_of_other_formats(tmp_path: Path) -> None:
    rows = [{"prompt": "\uc61b\ub0a0", "n": 1}, {"prompt": "two", "n": 2}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.ndjson").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.json", "b.ndjson"):
        assert through(tmp_path / name).select(["prompt", "n"]).to_pylist() == rows
    (tmp_path / "c.tsv").write_text("prompt\tn\na, b\t1\n")
    assert through(tmp_path / "c.tsv")["prompt"].to_pylist() == ["a, b"]
    (tmp_path / "a.json").write_text('[{"prompt": "a"},\n {"prompt": "b", "x": 1, "x": 2}]')
    with pytest.raises(UserError, match="a.json:.: duplicate key 'x'"):
        through(tmp_path / "a.json")


def test_keys_that_look_like_data_are_refused_in_time(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "x", f"k{number}": 1}) for number in range(9_000)]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match="p.jsonl: the rows have more than 4,096 different keys"):
        scan(find_files(str(path)), GenerateConfig())
