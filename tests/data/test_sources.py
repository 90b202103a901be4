from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from pyarrow.fs import FileSystem

from gptray.config import UserError
from gptray.data.sources import find_files
from gptray.storage.store_access import file_system

Form = Literal["NFC", "NFD"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.txt",
        "a.md",
        "deep/er/c.jsonl",
        "deep/d.csv.gz",
        "notes.docx",
        ".hidden/e.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def names(folder: Path, source: str | list[str]) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in find_files(source)]


def test_folder_gives_readable_files_by_path(folder: Path) -> None:
    assert names(folder, str(folder)) == ["a.md", "b.txt", "deep/d.csv.gz", "deep/er/c.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.jsonl", ["deep/er/c.jsonl"]),
        ("deep/**", ["deep/d.csv.gz", "deep/er/c.jsonl"]),
        ("[ab].*", ["a.md", "b.txt"]),
        ("deep/*", ["deep/d.csv.gz"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_glob_gives_matching_files(
    folder: Path, pattern: str, expected: list[str], prefix: str
) -> None:
    assert names(folder, f"{prefix}{folder}/{pattern}") == expected


def test_a_glob_finds_names_with_a_line_break(folder: Path) -> None:
    (folder / "two\nlines.txt").write_text("x")
    for pattern in ("*", "**"):
        for prefix in ("", "file://"):
            found = names(folder, f"{prefix}{folder}/{pattern}.txt")
            assert found == ["b.txt", "two\nlines.txt"], pattern


def test_list_keeps_its_order_and_each_file_once(folder: Path) -> None:
    source = [str(folder / "b.txt"), str(folder / "*.md"), str(folder / "b.txt"), str(folder)]
    assert names(folder, source)[:3] == ["b.txt", "a.md", "deep/d.csv.gz"]


def test_uri_names_files_and_folders(folder: Path) -> None:
    (file,) = find_files(f"file://{folder}/b.txt")
    assert file.name == f"file://{folder}/b.txt"
    assert file.open().read() == b"x"
    assert names(folder, f"file://{folder}") == names(folder, str(folder))


@pytest.mark.parametrize("uri", ["file://{}/no.txt", "file://{}/*.parquet", "nofs://a/b.txt"])
def test_uri_that_leads_nowhere_is_named(folder: Path, uri: str) -> None:
    with pytest.raises(UserError, match="data.source="):
        find_files(uri.format(folder))


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_is_found_in_any_unicode_form(tmp_path: Path, typed: Form, stored: Form) -> None:
    name = "\ud55c\uae00 caf\u00e9"
    path = tmp_path / name / unicodedata.normalize(stored, f"{name}.txt")
    path.parent.mkdir()
    path.write_text("x")
    for source in (f"{name}/{name}.txt", f"{name}/{name[0]}*.txt", f"**/{name}.*", name):
        words = f"{tmp_path}/{unicodedata.normalize(typed, source)}"
        assert names(tmp_path, words) == [os.path.relpath(path, tmp_path)], source


def test_literal_name_wins_over_glob(folder: Path) -> None:
    (folder / "[b].txt").write_text("x")
    assert names(folder, str(folder / "[b].txt")) == ["[b].txt"]


def test_home_and_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "deep")
    assert names(folder, ["~/b.txt", "er"]) == ["b.txt", "deep/er/c.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bb.txt", r"bb\.txt: there is no such file or folder; did you mean b\.txt\?"),
        ("nowhere/b.txt", r"nowhere is not a folder"),
        ("s3:/bucket/b.txt", r"s3:/ does not begin a URI; write s3://bucket/folder"),
        ("b.txt,b.txt", r"there is no such file; a list is written '\[.*, .*b\.txt\]'"),
        ("*.parquet", "no file matches"),
        (
            "notes.docx",
            r"cannot read \.docx .*\.txt \.md \.jsonl \.ndjson \.json \.csv \.tsv \.parquet",
        ),
        ("table.xsv", r"cannot read \.xsv; did you mean \.[ct]sv\?"),
        ("p.parquet.gz", r"cannot read \.parquet\.gz \("),
        ("a.tar.gz", r"cannot read \.tar\.gz \("),
        ("plain", "a name without extension"),
        ("empty", "holds no file that can be read .* 0 other files"),
        ("saved", r"saved: datasets\.save_to_disk wrote this folder; .*to_parquet"),
        ("saved/train", r"train: datasets\.save_to_disk wrote this folder"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, source: str, message: str) -> None:
    (folder / "saved/train").mkdir(parents=True)
    saved = ("dataset_dict.json", "train/dataset_info.json", "train/state.json")
    others = [f"saved/{name}" for name in saved]
    for name in ("table.xsv", "p.parquet.gz", "a.tar.gz", "plain", *others):
        (folder / name).write_text("{}")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_files(",".join(str(folder / name) for name in source.split(",")))


def test_all_mistakes_of_a_list_come_at_once(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files([str(folder / "one.txt"), str(folder / "b.txt"), str(folder / "two.docx")])
    assert "one.txt" in str(caught.value)
    assert "two.docx" in str(caught.value)


def test_empty_list_and_builtin_in_a_list_are_mistakes() -> None:
    with pytest.raises(UserError, match="empty list"):
        find_files([])
    with pytest.raises(UserError, match="builtin cannot be listed"):
        find_files(["builtin", "x.txt"])


def test_names_that_are_not_utf8_are_read_and_shown_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_text("one")
    (tmp_path / os.fsdecode(b"\xc7\xd1.txt")).write_text("two")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_text("picture")
    for source in (str(tmp_path), f"{tmp_path}/*.txt"):
        files = find_files(source)
        assert [file.name for file in files] == [f"{tmp_path}/ok.txt", f"{tmp_path}/\\xc7\\xd1.txt"]
        assert [file.open().read() for file in files] == [b"one", b"two"]
        assert not any(file.changed() for file in files)
    with pytest.raises(UserError, match=r"\\xc7\\xd1\.txt: not UTF-8; name the file by its folder"):
        find_files(str(tmp_path / os.fsdecode(b"\xc7\xd1.txt")))


def test_loop_of_links_is_entered_once(folder: Path) -> None:
    (folder / "deep" / "up").symlink_to("..")
    (folder / "here").symlink_to(".")
    expected = ["a.md", "b.txt", "deep/d.csv.gz", "deep/er/c.jsonl"]
    assert names(folder, str(folder)) == expected
    assert names(folder, f"{folder}/**/*.jsonl") == ["deep/er/c.jsonl"]
    assert names(folder, [str(folder), str(folder / "here")]) == expected


def test_link_to_nothing_is_named(folder: Path) -> None:
    (folder / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match=r"gone\.txt: a link to nowhere\.txt, which does not exist"):
        find_files(str(folder))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://datasets/a/b", r"cannot be read directly; download them first \(hf download"),
        ("https://host/a.txt", "download the file first"),
        ("s4://bucket/a.txt", r"unknown scheme s4://; known: file:// s3://"),
    ],
)
def test_scheme_that_is_not_read_says_what_to_do(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_files(uri)


def test_links_of_both_kinds_lead_to_one_file(tmp_path: Path) -> None:
    first = tmp_path / "a.txt"
    first.write_text("text")
    (tmp_path / "b.txt").hardlink_to(first)
    (tmp_path / "c.txt").symlink_to(first)
    assert [file.path for file in find_files(str(tmp_path))] == [str(first)]


def test_googles_client_gives_up_after_seconds() -> None:
    uri = "gs://anonymous@bucket/book.txt"
    assert file_system(uri) == FileSystem.from_uri(f"{uri}?retry_limit_seconds=10")
