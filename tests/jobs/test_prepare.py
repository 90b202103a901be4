from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import Config, UserError, load_config, override
from gptray.config.schema import differences
from gptray.data.tokenizer import char_tokenizer, train_bpe
from gptray.data.tokens import TokenData
from gptray.jobs.prepare.check import check, check_text, plan
from gptray.jobs.prepare.run import prepare, run
from tests.data import foreign
from tests.data.reference import (
    expected_runs,
    expected_tokens,
    splits_of,
    texts_of,
    tokens_of,
)
from tests.data.texts import KOREAN, many_documents, write_bytes, write_rows
from tests.generation.models import small_tokenizer
from tests.model.foreign_models import make_hf

TEXTS = many_documents(90)
SPLIT = (0.8, 0.1, 0.1)


def config_for(path: Path, storage: Path, **data: Any) -> Config:
    changes = {"data.source": str(path), "storage_path": str(storage), "data.split": list(SPLIT)}
    return override(Config(), {**changes, **{f"data.{k}": v for k, v in data.items()}})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


def left_in(storage: Path) -> list[str]:
    return sorted(path.name for path in (storage / "data").glob("*"))


@pytest.mark.parametrize("tokenizer", ["bpe", "char", "folder"])
@pytest.mark.parametrize("piece_bytes", [500, 1 << 20])
def test_result_is_that_of_one_process_and_whole_texts(
    ray_cluster: None, rows: Path, tmp_path: Path, tokenizer: str, piece_bytes: int
) -> None:
    runs = expected_runs(TEXTS, SPLIT, seed=1337)
    expected = {
        "bpe": train_bpe([run.text for run in runs["train"]], 400),
        "char": char_tokenizer("".join(TEXTS)),
        "folder": train_bpe(["another text"], 300),
    }[tokenizer]
    expected.save(tmp_path / "foreign")
    name = str(tmp_path / "foreign") if tokenizer == "folder" else tokenizer
    config = config_for(rows, tmp_path, tokenizer=name, vocab_size=400)

    data = prepare(config, piece_bytes=piece_bytes)

    data.verify()
    assert data.tokenizer.sha256 == expected.sha256
    assert tokens_of(data) == expected_tokens(runs, expected)
    for split, found in runs.items():
        text = "".join(run.text + data.tokenizer.eos_token * run.ends for run in found)
        assert texts_of(data)[split] == text
        assert splits_of(data)[split].documents == len(found)
        assert splits_of(data)[split].bytes == sum(len(run.text.encode()) for run in found)
    shards = data.manifest["splits"]["train"]["shards"]
    assert (len(shards) > 5) is (piece_bytes == 500)
    assert [shard["file"] for shard in shards] == [
        f"train-{number:05d}.bin" for number in range(len(shards))
    ]


def test_manifest_says_where_the_tokens_come_from(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    import hashlib

    data = prepare(config_for(rows, tmp_path, fraction=0.5))
    manifest = data.manifest
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert manifest["sources"] == [
        {"path": str(rows), "size": rows.stat().st_size, "sha256": digest}
    ]
    assert manifest["split"] == {"fractions": list(SPLIT), "cut_documents": 0, "seed": 1337}
    assert (manifest["documents"], manifest["empty_rows"]) == (len(TEXTS), 0)
    assert manifest["tokenizer"]["vocab_size"] == data.vocab_size == data.tokenizer.vocab_size
    half = expected_runs(TEXTS, SPLIT, seed=1337, fraction=0.5)
    assert tokens_of(data) == expected_tokens(half, data.tokenizer)
    characters = {name: sum(len(run.text) for run in runs) for name, runs in half.items()}
    told = {name: split["characters"] for name, split in manifest["splits"].items()}
    assert told == characters and manifest["splits"]["train"]["fallback_tokens"] == 0


def test_text_by_position_is_nanogpts_cut(ray_cluster: None, tmp_path: Path) -> None:
    text = "".join(TEXTS)
    path = write_bytes(tmp_path / "one.txt", text.encode())
    config = config_for(path, tmp_path, tokenizer="char", split=[0.9, 0.1])
    data = prepare(config, piece_bytes=700)
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert tokens_of(data) == {
        "train": [ids[character] for character in text[:cut]],
        "val": [*(ids[character] for character in text[cut:]), len(ids)],
    }


def test_book_beside_a_readme_gives_the_shares_asked_for(ray_cluster: None, tmp_path: Path) -> None:
    """Whichever of them the seed puts last, and with validation text that is the same."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_bytes(folder / "book.txt", "".join(TEXTS * 5).encode())
    write_bytes(folder / "README.md", b"# About the book\n" * 30)
    for seed in (1, 2):
        result: dict[str, Any] = run(
            check(config_for(folder, tmp_path, split=[0.9, 0.1], seed=seed))
        )
        total = sum(result["bytes"].values())
        assert result["bytes"]["val"] / total == pytest.approx(0.1, abs=0.02)
        assert sum(result["split_documents"].values()) == 3
        assert len(result["warnings"]) == 1  # of the markers in TEXTS
    with_test: dict[str, Any] = run(check(config_for(folder, tmp_path, split="80:10:10", seed=2)))
    assert with_test["bytes"]["val"] == result["bytes"]["val"]
    rows = dict(plan(check(config_for(folder, tmp_path, split="80:10:10", seed=2))))
    kilobytes = sum(file.stat().st_size for file in folder.iterdir()) / 1000
    shares = "train 80.0%, val 10.0%, test 10.0%"
    assert rows["source"] == f"2 files, {kilobytes:.1f} kB: {shares}"
    assert rows["test"].endswith(f" {with_test['tokens']['test']:,} tokens")
    assert rows["warnings"] == with_test["warnings"][0]


def test_validation_text_of_its_own_is_read_whole(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    stories = ["first story", "second\nstory", "third"]
    separator = "<|endoftext|>"
    write_bytes(folder / "train.txt", f" \n{separator}\n".join(stories).encode("utf-16"))
    write_bytes(folder / "val.txt", f"held {separator} out".encode())
    config = config_for(folder, tmp_path, tokenizer="char", separator=separator, split="90:10")
    with caplog.at_level(logging.INFO, logger="gptray"):
        data = prepare(override(config, {"data.val_source": str(folder / "val.txt")}))
    found = {name: text.split(separator)[:-1] for name, text in texts_of(data).items()}
    assert found == {"train": stories, "val": ["held", "out"]}
    assert any("train.txt is read as utf-16" in message for message in caplog.messages)
    assert [Path(one["path"]).name for one in data.manifest["val_source"]] == ["val.txt"]


def test_builtin_needs_no_file(ray_cluster: None, tmp_path: Path) -> None:
    data = prepare(override(Config(), {"storage_path": str(tmp_path)}))
    assert data.vocab_size == 2048
    assert data.manifest["sources"][0]["path"] == "builtin"
    assert data.train.bytes / data.manifest["bytes"] == pytest.approx(0.9, abs=0.01)
    assert 2.5 < data.val.bytes / data.val.tokens < 4
    assert not list(data.data_dir.glob("*.jsonl"))


def test_prepared_data_is_used_again(ray_cluster: None, rows: Path, tmp_path: Path) -> None:
    config = config_for(rows, tmp_path)
    assert check_text(config).data is None
    first = run(check(config))
    assert first["built"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    again = run(check(config))
    assert not again["built"]
    assert again["data_dir"] == first["data_dir"]
    assert again["tokens"] == first["tokens"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == written
    json.dumps([first, again], allow_nan=False)


def test_changed_source_goes_into_another_folder(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    config = config_for(rows, tmp_path, tokenizer="char")
    first = prepare(config)
    write_rows(rows, [*TEXTS, KOREAN])
    assert check_text(config).data is None
    second = prepare(config)
    assert second.data_dir != first.data_dir
    assert second.fingerprint != first.fingerprint
    assert second.manifest["documents"] == len(TEXTS) + 1
    TokenData.open(first.data_dir).verify()


@pytest.mark.parametrize("damage", ["shard", "bit", "manifest", "tokenizer"])
def test_damaged_data_is_built_again_and_said(
    ray_cluster: None, rows: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(rows, tmp_path, tokenizer="char")
    first = prepare(config)
    fingerprint = first.fingerprint
    if damage == "shard":
        path = first.data_dir / "val-00000.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "bit":
        path = first.data_dir / "train-00000.bin"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif damage == "manifest":
        (first.data_dir / "manifest.json").write_text("{")
    else:
        shutil.rmtree(first.data_dir / "tokenizer")
    with caplog.at_level(logging.WARNING, logger="gptray"):
        second = prepare(config)
    assert sum("prepared data is damaged" in message for message in caplog.messages) == 1
    assert second.fingerprint == fingerprint
    second.verify()
    assert left_in(tmp_path) == [first.data_dir.name]


def test_bad_line_surfaces_as_itself_and_leaves_nothing(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    with rows.open("a") as stream:
        stream.write('{"text": oops}\n')
    with pytest.raises(UserError, match=rf"^{rows}:{len(TEXTS) + 1}: not JSON") as caught:
        prepare(config_for(rows, tmp_path), piece_bytes=400)
    assert "Traceback" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_failing_task_leaves_nothing(ray_cluster: None, rows: Path, tmp_path: Path) -> None:
    """A foreign tokenizer that cannot spell the text fails while shards are being written."""
    char_tokenizer("abc").save(tmp_path / "foreign")
    with pytest.raises(UserError, match="character tokenizer does not know"):
        prepare(config_for(rows, tmp_path, tokenizer=str(tmp_path / "foreign")), piece_bytes=400)
    assert left_in(tmp_path) == []


def test_two_at_once_end_with_one_whole_folder(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    config = config_for(rows, tmp_path, tokenizer="char")
    found: list[TokenData] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(config))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0].fingerprint == found[1].fingerprint
    found[0].verify()
    assert left_in(tmp_path) == [found[0].data_dir.name]


def test_what_killed_attempts_left_goes_once_it_is_old(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    config = config_for(rows, tmp_path, tokenizer="char")
    name = prepare(config).data_dir.name
    shutil.rmtree(tmp_path / "data" / name)
    for attempt, age in (("old", 2 * 24 * 3600), ("young", 60)):
        folder = tmp_path / "data" / f".{name}.{attempt}"
        folder.mkdir()
        then = time.time() - age
        os.utime(folder, (then, then))
    assert check_text(config).data is None
    prepare(config)
    assert left_in(tmp_path) == [f".{name}.young", name]


def test_check_text_tells_everything_at_once_without_ray(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["x"], column="body")
    write_rows(tmp_path / "b.csv", ["x"], column="tekst")
    config = config_for(tmp_path, tmp_path / ".storage", tokenizer="./nowhere")
    with pytest.raises(UserError) as caught:
        check_text(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "data.tokenizer=./nowhere" in lines[0]
    assert "a.jsonl" in lines[1] and "columns: id, body" in lines[1]
    assert "b.csv" in lines[2] and "columns: tekst" in lines[2]


FAR_DOWN = {
    "t.csv": ("text,b\n" + "hello world,x\n" * 20_000 + "a,b,c", "20002: 3 fields"),
    "t.jsonl": ('{"text": "hello world"}\n' * 20_000 + '{"text": 1}', "20001: .* a number, not"),
    "t.json": ('{"text": "hello world"}\n' * 20_000 + '{"body": ""}', "20001: no column 'text'"),
    "t.txt": ("hello world\n" * 20_000 + "caf\udce9", "20001: not UTF-8"),
}


@pytest.mark.parametrize("name", FAR_DOWN)
def test_a_bad_row_far_down_a_small_file_is_told_without_ray(tmp_path: Path, name: str) -> None:
    content, message = FAR_DOWN[name]
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=f"{name}:{message}"):
        check_text(config_for(tmp_path / name, tmp_path / "s", tokenizer="char"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.txt", " \n"), ("t.csv", "text\n"), ("t.json", "[]"), ("t.jsonl", '{"text": null}\n')],
)
def test_a_source_without_text_is_told_without_ray(tmp_path: Path, name: str, content: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_text(content)
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), source / "none.parquet")
    config = config_for(source, tmp_path / "s", tokenizer="char")
    with pytest.raises(UserError, match=r"data\.source holds no text"):
        check_text(config)
    (source / "more.txt").write_text("text")
    check_text(config)


def test_a_text_is_identified_once_when_it_is_checked(rows: Path, tmp_path: Path) -> None:
    checked = check_text(config_for(rows, tmp_path))
    rows.unlink()  # many files take minutes to read again
    assert checked.request.data_dir.parent == tmp_path / "data"


def test_check_text_accepts_what_can_be_prepared(rows: Path, tmp_path: Path) -> None:
    check_text(Config())
    check_text(config_for(rows, tmp_path))
    with pytest.raises(UserError) as caught:
        check_text(config_for(tmp_path / "no.txt", tmp_path, tokenizer="bpee"))
    assert "there is no such file" in str(caught.value)
    assert "did you mean bpe?" in str(caught.value)


def test_a_model_named_for_its_tokenizer_changes_no_other_setting(
    rows: Path, tmp_path: Path
) -> None:
    make_hf("gpt2", 300).save_pretrained(tmp_path / "base")
    small_tokenizer().save(tmp_path / "base")
    words = [f"storage_path={tmp_path}", f"data.source={rows}", f"model.init_from={tmp_path}/base"]
    given = load_config(None, words)
    assert differences(check(given).config) == differences(given)


def test_storage_path_that_cannot_be_written_is_named(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="storage_path: .* cannot be written"):
        prepare(config_for(rows, tmp_path / "file"))


@pytest.mark.parametrize(
    ("place", "told"),
    [("$HOME/runs", r"\$HOME is not expanded"), ("s3:/runs", "write s3://bucket/")],
)
def test_a_storage_path_that_means_another_place_is_no_folder(
    rows: Path, tmp_path: Path, place: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        check_text(config_for(rows, tmp_path / place))


def test_what_a_tokenizer_loses_is_counted_told_and_kept(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["The cat sees a dog.", "the cat \ud55c\uad6d\uc5b4 sees"] * 40
    rows = write_rows(tmp_path / "rows.jsonl", texts)
    name = str(foreign.save(foreign.wordpiece(), tmp_path / "bert"))
    config = config_for(rows, tmp_path, tokenizer=name, eos_token="[SEP]", split=[0.5, 0.5])
    with caplog.at_level(logging.WARNING, "gptray"):
        line: dict[str, Any] = run(check(config))
        run(check(config))  # told each time
    data = check_text(config).data
    assert data
    manifest = data.manifest
    kinds = manifest["tokenizer"]["lost"]["kinds"]
    assert kinds == {"unknown": 9 * 40, "case": 40}
    total = manifest["bytes"]
    assert data.loses == (
        f"the tokenizer loses {100 * 400 / total:.1f}% of the text (unknown characters "
        f"{100 * 360 / total:.1f}%, changed case {100 * 40 / total:.1f}%), such as "
        "'\ud55c\uad6d\uc5b4' -> '[UNK]', 'The' -> 'the'"
    )
    told = f"{data.loses}; losses and bits per byte count 8 bits for each lost byte"
    assert [record.message for record in caplog.records].count(told) == 2
    splits = manifest["splits"]
    assert sum(split["lost_bytes"] for split in splits.values()) == 400
    for name, split in splits.items():
        assert split["lost_bytes"] == sum(shard["lost_bytes"] for shard in split["shards"])
        assert line["lost"][name] == pytest.approx(split["lost_bytes"] / split["bytes"], abs=1e-6)
    assert data.tokenizer.eos_token == manifest["tokenizer"]["eos_token"] == "[SEP]"
    assert ("lost", data.loses) in plan(check(config))


def test_text_that_the_tokenizer_cannot_read_names_file_and_word(
    ray_cluster: None, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["the cat", "the zebra"] * 9)
    name = str(foreign.save(foreign.word_level(), tmp_path / "words", {"eos_token": "</s>"}))
    with pytest.raises(UserError, match=rf"^{rows}: .* does not know 'zebra'"):
        prepare(config_for(rows, tmp_path, tokenizer=name))
    assert left_in(tmp_path) == []
