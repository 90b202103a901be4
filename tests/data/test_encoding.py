from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gptray.config import ConfigError, UserError, load_config
from gptray.data.corpus import first_look, read_parts
from gptray.data.csv_text import csv_rows
from gptray.data.encoding import likely_encoding
from gptray.data.pieces import Reading, plan_pieces
from gptray.data.rows import text_lines
from gptray.data.sources import find_files
from tests.data.texts import write_bytes

KOREAN = "옛날 옛날에 호랑이가 살았습니다.\n오늘은 날씨가 좋아서 강가를 걸었다.\n"
JAPANESE = "むかしむかし、あるところに、おじいさんとおばあさんがいました。\n"
CHINESE = "从前有一个老人，他住在山里，每天都去河边钓鱼。\n"
RUSSIAN = "Жили-были старик со старухой у самого синего моря.\n"
FRENCH = "Il était une fois un garçon très occupé à Noël.\n"
QUOTES = "It’s a plain text, but for “quotes”.\n"


def read(path: Path, encoding: str | None = None, *, piece_bytes: int = 1 << 20) -> str:
    files = find_files(str(path), encoding=encoding)
    units = plan_pieces(files, Reading(), piece_bytes=piece_bytes, cut_text=True)
    return "".join(part.text for unit in units for piece in unit for part in read_parts(piece))


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (KOREAN, "cp949", "cp949"),
        (KOREAN, "euc-kr", "cp949"),
        (JAPANESE, "shift_jis", "shift_jis"),
        (JAPANESE, "euc_jp", "euc_jp"),
        (CHINESE, "gb18030", "gb18030"),
        (RUSSIAN, "cp1251", "cp1251"),
        (FRENCH, "cp1252", "cp1252"),
        (QUOTES, "cp1252", "cp1252"),
        (KOREAN, "utf-16-le", "utf-16-le"),
        (KOREAN, "utf-16-be", "utf-16-be"),
    ],
)
def test_message_names_the_likely_encoding_and_it_reads_the_text(
    tmp_path: Path, text: str, encoding: str, named: str
) -> None:
    path = write_bytes(tmp_path / "t.txt", ("plain\n" + text * 9).encode(encoding))
    with pytest.raises(UserError, match=rf"t\.txt:\d+: not UTF-8: .*data\.encoding={named}$"):
        first_look(find_files(str(path))[0], Reading())
    assert read(path, named) == "plain\n" + text * 9


@pytest.mark.parametrize("name", ["idna", "base64", "rot13"])
def test_a_codec_that_reads_no_text_files_is_refused_and_never_suggested(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown encoding \(such as cp949, utf-16, cp1252\)"):
        load_config(None, [f"data.encoding={name}"])


def test_bytes_in_no_likely_encoding_are_told_without_a_guess(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", b"one\ntwo \xff\x81\x01\n")
    with pytest.raises(
        UserError, match=r"t\.txt:2: not UTF-8: .*set data.encoding to the file's encoding"
    ):
        read(path)
    assert likely_encoding(b"\x81\x00") is None


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_wide_ascii_without_a_mark_does_not_pass_for_utf8(tmp_path: Path, encoding: str) -> None:
    path = write_bytes(tmp_path / "t.txt", ("plain words only\n" * 50).encode(encoding))
    with pytest.raises(UserError, match=f"looks like {encoding} .*data.encoding={encoding}"):
        read(path)


def test_a_file_of_zero_bytes_is_no_text_in_any_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.txt: it begins with nothing but zero bytes"):
        read(write_bytes(tmp_path / "t.txt", bytes(4096)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "r.jsonl", "r.json", "r.csv", "r.tsv"])
def test_byte_order_mark_is_used_without_being_asked_for(
    tmp_path: Path, name: str, encoding: str
) -> None:
    row = KOREAN.strip().replace("\n", " ")
    content = {
        "txt": row,
        "jsonl": json.dumps({"id": 1, "text": row}, ensure_ascii=False) + "\n",
        "json": json.dumps([{"id": 1, "text": row}], ensure_ascii=False),
        "csv": f"id,text\r\n1,{row}\r\n",
        "tsv": f"id\ttext\r\n1\t{row}\r\n",
    }[name.split(".")[1]]
    path = write_bytes(tmp_path / name, content.encode(encoding))
    assert read(path, piece_bytes=16) == row


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "gb18030", "iso2022_jp_3"])
def test_text_in_another_encoding_is_decoded_as_a_stream(tmp_path: Path, encoding: str) -> None:
    text = (KOREAN if encoding in ("cp949", "utf-16") else "plain words\n") * 60_000
    assert read(write_bytes(tmp_path / "t.txt", text.encode(encoding)), encoding) == text


def test_what_the_asked_encoding_cannot_decode_is_named_by_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", KOREAN.encode("cp949") * 3 + b"\xff\xff\n")
    with pytest.raises(UserError, match=r"t\.txt:7: not cp949: "):
        read(path, "cp949")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp949"])
def test_utf8_that_is_asked_for_as_another_encoding_is_told(tmp_path: Path, encoding: str) -> None:
    path = write_bytes(tmp_path / "t.txt", (KOREAN * 3).encode())
    with pytest.raises(UserError, match=f"not {encoding}: .*; it is UTF-8: leave data.encoding"):
        read(path, encoding)


def test_rows_of_prompts_take_an_encoding_too(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "r.csv", f"p\n{JAPANESE}".encode("euc_jp"))
    (rows,) = find_files(str(path), encoding="euc_jp")
    assert list(csv_rows(rows)) == [(1, ["p"]), (2, [JAPANESE.strip()])]
    (lines,) = find_files(str(write_bytes(tmp_path / "r.txt", KOREAN.encode("utf-16"))))
    with lines.open() as stream:
        assert "".join(text_lines(lines, stream)) == KOREAN


@pytest.mark.parametrize("name", ["r.txt", "r.csv", "r.jsonl"])
def test_wide_rows_without_a_mark_do_not_pass_for_utf8(tmp_path: Path, name: str) -> None:
    path = write_bytes(tmp_path / name, ("prompt\nplain words\n" * 9).encode("utf-16-le"))
    (file,) = find_files(str(path))
    with file.open() as stream, pytest.raises(UserError, match="data.encoding=utf-16-le"):
        list(text_lines(file, stream))


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", KOREAN.encode()[:-3] + b"\xea\n")
    with pytest.raises(UserError, match=r"t\.txt:2: not UTF-8: .*the file is damaged there$"):
        read(path)


def test_a_byte_order_mark_of_utf8_holds_whatever_is_asked_for(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", b"\xef\xbb\xbf" + KOREAN.encode())
    assert read(path, "cp949") == KOREAN


OTHER_KINDS = {
    "gzip": (gzip.compress(b"text"), "a gzip file; add .gz to its name"),
    "zip": (b"PK\3\4\x14" + bytes(30), "a zip archive"),
    "pdf": (b"%PDF-1.7\n", "a PDF document; extract its text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "tar": (b"a.txt".ljust(257, b"\0") + b"ustar\0", "a tar archive; unpack it"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", ["t.txt", "r.jsonl", "r.json", "r.csv", "r.parquet"])
def test_a_file_of_another_kind_is_told_whatever_its_name(
    tmp_path: Path, name: str, kind: str
) -> None:
    content, words = OTHER_KINDS[kind]
    path = write_bytes(tmp_path / name, content)
    for encoding in (None, "cp949") if name != "r.parquet" else (None,):
        with pytest.raises(UserError, match=f"{name}: this is .*{words}"):
            read(path, encoding)
