from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptray.config import UserError
from gptray.data.sources import find_files


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
        ("[ab].*", ["a.md", "b.txt"]),
        ("deep/*", ["deep/d.csv.gz"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_glob_gives_matching_files(
    folder: Path, pattern: str, expected: list[str], prefix: str
) -> None:
    assert names(folder, f"{prefix}{folder}/{pattern}") == expected


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
        ("*.parquet", "no file matches"),
        (
            "notes.docx",
            r"cannot read \.docx .*\.txt \.md \.jsonl \.ndjson \.json \.csv \.tsv \.parquet",
        ),
        ("table.xsv", r"cannot read \.xsv; did you mean \.[ct]sv\?"),
        ("p.parquet.gz", r"cannot read \.gz"),
        ("plain", "a name without extension"),
        ("empty", "holds no file that can be read"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, source: str, message: str) -> None:
    for name in ("table.xsv", "p.parquet.gz", "plain"):
        (folder / name).write_text("x")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_files(str(folder / source))


def test_all_mistakes_of_a_list_come_at_once(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files([str(folder / "one.txt"), str(folder / "b.txt"), str(folder / "two.docx")])
    assert "one.txt" in str(caught.value)
    assert "two.docx" in str(caught.value)


def test_empty_list_and_builtin_in_a_list_are_mistakes() -> None:
    with pytest.raises(UserError, match="empty list"):
        find_files([])
    with pytest.raises(UserError, match="builtin stands alone"):
        find_files(["builtin", "x.txt"])
