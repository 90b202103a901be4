from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import UserError
from gptray.data.corpus import first_look, read_parts
from gptray.data.documents import EMPTY_ROW
from gptray.data.pieces import UNIT_PIECES, Reading, plan_pieces
from gptray.data.sources import find_files
from tests.data.texts import CHINESE, DOCUMENTS, ENGLISH, KOREAN, write_bytes, write_rows

ROW_FORMATS = [
    "r.jsonl",
    "r.jsonl.gz",
    "r.jsonl.zst",
    "r.jsonl.bz2",
    "r.csv",
    "r.csv.gz",
    "r.csv.zst",
    "r.parquet",
]
TEXT = Reading()
TEXT_FORMATS = ["t.txt", "t.md", "t.txt.gz", "t.md.zst"]


def read(path: Path, *, piece_bytes: int = 1 << 20, reading: Reading = TEXT) -> list[str]:
    """Every document and every empty row ("") of a file, read piece by piece."""
    documents = [""]
    files = find_files(str(path))
    for unit in plan_pieces(files, reading, piece_bytes=piece_bytes, cut_text=True):
        for piece in unit:
            for part in read_parts(piece):
                assert part != EMPTY_ROW or not documents[-1], "a document has no empty row"
                documents[-1] += part.text
                if part.ends:
                    documents.append("")
    assert documents.pop() == "", "the last document has no end"
    return documents


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_come_back_exactly(tmp_path: Path, name: str) -> None:
    assert read(write_rows(tmp_path / name, DOCUMENTS)) == DOCUMENTS


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read(write_rows(tmp_path / name, DOCUMENTS)) == ["".join(DOCUMENTS)]


@pytest.mark.parametrize("name", ["t.txt", "r.jsonl"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000, 10_000])
def test_pieces_join_to_the_whole(tmp_path: Path, name: str, piece_bytes: int) -> None:
    texts = DOCUMENTS * 3
    path = write_rows(tmp_path / name, texts)
    assert read(path, piece_bytes=piece_bytes) == (["".join(texts)] if name == "t.txt" else texts)


def test_text_longer_than_a_block_comes_back(tmp_path: Path) -> None:
    with_spaces = ENGLISH * 40_000
    without = "\u3002" * 900_000  # nowhere to cut
    for text in (with_spaces, without, "." * (2 << 20), CHINESE * 100_000):
        assert read(write_bytes(tmp_path / "long.txt", text.encode()), piece_bytes=1 << 19) == [
            text
        ]


def test_parquet_row_groups_are_pieces(tmp_path: Path) -> None:
    texts = DOCUMENTS * 20
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in kinds:
        table = pa.table({"text": pa.array(texts).cast(kind)})
        parquet.write_table(table, tmp_path / "r.parquet", row_group_size=30)
        files = find_files(str(tmp_path / "r.parquet"))
        assert len(plan_pieces(files, TEXT, piece_bytes=1, cut_text=True)) == 6
        assert read(tmp_path / "r.parquet", piece_bytes=1) == texts


def test_small_files_share_a_unit_and_large_ones_are_cut(tmp_path: Path) -> None:
    for name, size in (("a.txt", 10), ("b.txt", 10), ("c.txt", 250), ("d.csv", 250)):
        (tmp_path / name).write_bytes(b"x " * (size // 2))
    units = plan_pieces(find_files(str(tmp_path)), TEXT, piece_bytes=100, cut_text=True)
    shape = [[(Path(p.file.name).name, p.start, p.stop) for p in unit] for unit in units]
    assert shape == [
        [("a.txt", 0, 10), ("b.txt", 0, 10)],
        [("c.txt", 0, 100)],
        [("c.txt", 100, 200)],
        [("c.txt", 200, 250)],
        [("d.csv", 0, 250)],
    ]
    one, *_ = files = find_files(str(tmp_path / "c.txt"))
    whole = plan_pieces(files, TEXT, piece_bytes=100, cut_text=False)
    assert [(piece.start, piece.stop) for unit in whole for piece in unit] == [(0, 250)]
    tiny = [replace(one, path=f"{number}.txt", size=1) for number in range(2 * UNIT_PIECES + 1)]
    many = plan_pieces(tiny, TEXT, piece_bytes=16 << 20, cut_text=True)
    assert [len(unit) for unit in many] == [UNIT_PIECES, UNIT_PIECES, 1]


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "r.jsonl", "r.csv"])
def test_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = write_rows(tmp_path / name.removesuffix(".gz"), [KOREAN]).read_bytes()
    assert read(write_bytes(tmp_path / name, b"\xef\xbb\xbf" + content)) == [KOREAN]


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet"])
def test_empty_rows_are_marked(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ["one", "", " \n", "two"])
    assert read(path) == ["one", "", "", "two"]


@pytest.mark.parametrize("content", [b"", b" \n\r\n", b"\xef\xbb\xbf"])
def test_blank_text_file_is_no_document(tmp_path: Path, content: bytes) -> None:
    assert read(write_bytes(tmp_path / "t.txt", content)) in ([], [""])


def good_lines(count: int) -> bytes:
    return b'{"text": "fine"}\n' * count


BAD_JSON = [
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "cut"', r"Expecting ',' delimiter \(column 15\)"),
    (b"[1]", "expected a JSON object, found a list"),
    (b'{"text": 3}', "column 'text' holds a number, not text"),
    (b'{"text": ["a"]}', "column 'text' holds a list, not text"),
    (b'{"texts": "a", "id": 1}', "no column 'text'; columns: texts, id"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "a number has more than 4,300 digits$"),
]


@pytest.mark.parametrize(("line", "message"), BAD_JSON)
@pytest.mark.parametrize(("name", "piece_bytes"), [("r.jsonl", 1 << 20), ("r.jsonl", 50),
                                                   ("r.jsonl.gz", 50)])  # fmt: skip
def test_bad_json_line_is_named(
    tmp_path: Path, line: bytes, message: str, name: str, piece_bytes: int
) -> None:
    path = write_bytes(tmp_path / name, good_lines(41) + line + b"\n" + good_lines(3))
    with pytest.raises(UserError, match=rf"{name}:42: .*{message}"):
        read(path, piece_bytes=piece_bytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html>\n", r"not JSON: Expecting value \(column 1: <!DOCTYPE html>\)$"),
        ("{'text': 'a'}\n", r"not JSON: .* \(column 2: 'text': 'a'\}\)$"),
        (
            '[{"text": "a"}]\n',
            "expected a JSON object, found a list; if it is an array, .* name the file .json",
        ),
        (
            '[\n{"text": "a"}\n]\n',
            r"not JSON: Expecting value \(column 2\); .* name the file .json",
        ),
        (
            '{\n "text": "a"\n}\n',
            ".*; if it is an array, or its rows span lines, name the file .json",
        ),
    ],
)
def test_lines_that_are_not_rows_are_told_with_what_they_are(
    tmp_path: Path, content: str, message: str
) -> None:
    path = write_bytes(tmp_path / "r.jsonl", content.encode())
    with pytest.raises(UserError, match=rf"r\.jsonl:1: {message}"):
        read(path)


BAD_CSV = [
    (b"8,one,two", "3 fields, but the header has 2"),
    (b"8", "1 field, but the header has 2"),
    (b'8,"a"b', "text follows a closing quotation mark; double the marks"),
    (b'8,"open', "a field of this row begins with a quotation mark but never ends with one"),
    (b"8,\xff", "not UTF-8"),
]


@pytest.mark.parametrize(("row", "message"), BAD_CSV)
def test_bad_csv_row_is_named_by_its_first_line(tmp_path: Path, row: bytes, message: str) -> None:
    content = b'id,text\n1,"two\nlines"\n2,x\n' + row + b"\n"
    with pytest.raises(UserError, match=rf"r\.csv:5: .*{message}"):
        read(write_bytes(tmp_path / "r.csv", content))


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_csv_lines_may_end_in_any_way(tmp_path: Path, end: str) -> None:
    content = end.join(["id,text", "1,one", f'2,"two{end}lines"', "3,th\u2028ree", ""])
    path = write_bytes(tmp_path / "r.csv", content.encode())
    assert read(path) == ["one", f"two{end}lines", "th\u2028ree"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("id;text", r"columns: id;text \(.*\); semicolons seem to separate the columns"),
        ("id\ttext", r"columns: 'id\\ttext' \(.*\); tabs seem to separate the columns"),
        ("id, text", r"columns: ' text', id \("),
        (f"0,{'a long text ' * 999}", r"columns: 0, a long text a long text a long text a l\S+ \("),
        (",".join(map(str, range(99))), r"columns: 0, 1, 2.* and 69 more \("),
    ],
)
def test_the_columns_of_a_header_are_listed_to_be_read(
    tmp_path: Path, header: str, message: str
) -> None:
    (file,) = find_files(str(write_bytes(tmp_path / "r.csv", f"{header}\n".encode())))
    with pytest.raises(UserError, match=f"no column 'text'; {message}") as caught:
        first_look(file, TEXT)
    assert len(str(caught.value)) < 400


def test_two_csv_columns_of_the_same_name_are_no_text_column(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "r.csv", b"text,text\na,b\n")
    with pytest.raises(UserError, match=r"r\.csv:1: several columns are named 'text'"):
        read(path)


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
@pytest.mark.parametrize("piece_bytes", [300, 1 << 20])
def test_text_that_is_not_utf8_is_named_by_line(
    tmp_path: Path, name: str, piece_bytes: int
) -> None:
    content = b"a good line\n" * 99 + b"caf\xe9 au lait\n" + b"a good line\n" * 9
    with pytest.raises(UserError, match=rf"{name}:100: not UTF-8"):
        read(write_bytes(tmp_path / name, content), piece_bytes=piece_bytes)


def test_utf8_cut_off_at_the_end_is_named(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", b"one\n" + KOREAN.encode()[:-1])
    with pytest.raises(UserError, match=r"t\.txt:3: not UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst", "r.jsonl.gz", "r.csv.zst", "t.txt.bz2"])
def test_truncated_compressed_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, DOCUMENTS * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{name}: truncated or damaged"):
        read(path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_compressed_streams_behind_one_another_are_one_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.txt.{suffix}"
    both = [write_bytes(path, text.encode()).read_bytes() for text in (KOREAN, ENGLISH)]
    path.write_bytes(b"".join(both))
    assert read(path) == [KOREAN + ENGLISH]


def test_file_that_is_not_compressed_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"t\.txt\.gz: truncated or damaged"):
        read(tmp_path / "t.txt.gz")


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.parquet", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"r\.parquet: not a complete Parquet file"):
        read(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "r.jsonl.gz"])
def test_first_look_offers_the_nearest_first(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ["a"], column="body")
    (file,) = find_files(str(path))
    first_look(file, Reading("body"))
    with pytest.raises(UserError, match=r"no column 'bdy'; columns: body, id .*data\.text_column"):
        first_look(file, Reading("bdy"))


def test_first_look_refuses_numbers_in_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "r.parquet")
    (file,) = find_files(str(tmp_path / "r.parquet"))
    with pytest.raises(UserError, match="column 'text' holds int64, not text"):
        first_look(file, TEXT)


def test_a_parquet_column_is_found_by_its_whole_name(tmp_path: Path) -> None:
    name, path = "doc.text", tmp_path / "r.parquet"
    parquet.write_table(pa.table({"doc": [{"text": "inner"}], name: ["whole"]}), path)
    assert read(path, reading=Reading(name)) == ["whole"]
    doubled = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    parquet.write_table(doubled, path)
    (file,) = find_files(str(path))
    with pytest.raises(UserError, match="several columns are named 'text'; rename all but one"):
        first_look(file, TEXT)


def test_csv_cell_may_be_long(tmp_path: Path) -> None:
    text = "long, " * 100_000
    assert read(write_rows(tmp_path / "r.csv", [text, json.dumps(text)])) == [
        text,
        json.dumps(text),
    ]


def test_missing_text_is_an_empty_row_in_every_format(tmp_path: Path) -> None:
    rows = ["one", None, "", "two"]
    as_json = [json.dumps({"id": n, "text": text}) for n, text in enumerate(rows)]
    parquet.write_table(pa.table({"text": pa.array(rows)}), tmp_path / "r.parquet")
    contents = {
        "r.jsonl": "\n".join(as_json),
        "r.ndjson": "\n".join(as_json),
        "r.json": f"[{', '.join(as_json)}]",
        "r.csv": "id,text\n0,one\n1,\n2,\n3,two\n",
        "r.tsv": "id\ttext\n0\tone\n1\t\n2\t\n3\ttwo\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name in [*contents, "r.parquet"]:
        assert read(tmp_path / name) == ["one", "", "", "two"], name
    parquet.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "nulls.parquet")
    assert read(tmp_path / "nulls.parquet") == ["", ""]
    first_look(find_files(str(tmp_path / "nulls.parquet"))[0], TEXT)


JSON_FORMS = [
    lambda rows: json.dumps(rows),
    lambda rows: json.dumps(rows, indent=2),
    lambda rows: "\n".join(map(json.dumps, rows)),
    lambda rows: "\n\n".join(json.dumps(row, indent=1) for row in rows) + "\n",
    lambda rows: "[\n" + "\n,\n".join(map(json.dumps, rows)) + "]\n\n",
]


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_json_is_an_array_or_objects_behind_one_another(
    tmp_path: Path, form: Callable[[list[dict[str, object]]], str], name: str
) -> None:
    long = ["\ub098\ub78f " * 700_000, '{"[' * 500_000]  # beyond a block
    texts = [*DOCUMENTS, *long, "after"]
    rows: list[dict[str, object]] = [{"n": n, "text": text} for n, text in enumerate(texts)]
    assert read(write_bytes(tmp_path / name, form(rows).encode())) == texts
    assert read(write_bytes(tmp_path / name, form([]).encode())) in ([], [""])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', r"r\.json:3: not JSON: Expecting ','"),
        ('[{"text": "a"},\n\n {"text": oops}]', r"r\.json:3: not JSON: Expecting value"),
        ('[{"text": "a"},\n 3]', r"r\.json:2: expected a JSON object, found a number"),
        ('{"text": "a"}\n{"txt": "b"}', r"r\.json:2: no column 'text'; columns: txt"),
        ('[{"text": "a"}]\n x', r"r\.json:2: not JSON: Extra data"),
        ('[{"text": "a"},\n', r"r\.json:2: not JSON"),
        ("true", r"r\.json:1: expected a JSON object"),
    ],
)
def test_bad_json_is_named_by_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write_bytes(tmp_path / "r.json", content.encode()))


def test_first_look_finds_a_bad_row_near_the_top(tmp_path: Path) -> None:
    (file,) = find_files(str(write_bytes(tmp_path / "r.csv", b"id,text\n1,a\n2,b,c\n")))
    with pytest.raises(UserError, match=r"r\.csv:3: 3 fields, but the header has 2"):
        first_look(file, TEXT)


def test_line_that_spans_pieces_is_read_once(tmp_path: Path) -> None:
    texts = ["a" * 5000, "b", "c" * 300]
    path = write_rows(tmp_path / "r.jsonl", texts)
    assert read(path, piece_bytes=64) == texts
