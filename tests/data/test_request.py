from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gptray.config import Config, UserError, override
from gptray.data.request import make_request
from gptray.data.tokenizer import train_bpe
from tests.data.texts import KOREAN, write_bytes, write_rows


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = write_bytes(tmp_path / "a text.txt", KOREAN.encode())
    return override(Config(), {"data.source": str(path), "storage_path": str(tmp_path / "store")})


def folder(config: Config, **changes: object) -> Path:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return make_request(override(config, changed)).data_dir


def test_folder_is_named_by_source_and_content(config: Config, tmp_path: Path) -> None:
    data_dir = folder(config)
    assert data_dir.parent == tmp_path / "store" / "data"
    assert data_dir.name.startswith("a-text-")
    assert folder(config, data__source="builtin").name.startswith("builtin-")
    assert folder(config, storage_path="~/x").is_relative_to(Path.home())


def test_each_setting_that_matters_asks_for_another_folder(config: Config, tmp_path: Path) -> None:
    train_bpe([KOREAN], 300).save(tmp_path / "tokenizer")
    content = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer" / "vocabulary.json").write_bytes(content)
    changes: list[dict[str, object]] = [
        {},
        {"data__vocab_size": 300},
        {"data__tokenizer": "char"},
        {"data__tokenizer": str(tmp_path / "tokenizer")},
        {"data__tokenizer": str(tmp_path / "tokenizer"), "data__eos_token": "!"},
        {"data__tokenizer": str(tmp_path / "tokenizer" / "vocabulary.json")},
        {"data__tokenizer": "some-owner/some-tokenizer"},
        {"data__split": [0.5, 0.5]},
        {"data__fraction": 0.5},
        {"seed": 3},
    ]
    folders = {folder(config, **change) for change in changes}
    assert len(folders) == len(changes)


def test_settings_that_do_not_matter_share_a_folder(config: Config) -> None:
    assert folder(config, data__text_column="body") == folder(config)
    assert folder(config, train__max_steps=3, name="other") == folder(config)
    char = folder(config, data__tokenizer="char")
    assert folder(config, data__tokenizer="char", data__vocab_size=999) == char


def test_text_column_matters_for_rows(config: Config, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "r.jsonl", [KOREAN]))
    body = folder(config, data__source=rows, data__text_column="body")
    assert body != folder(config, data__source=rows)


CHANGES: list[tuple[Callable[[Path], object], bool]] = [
    (lambda path: os.utime(path, (1, 1)), True),
    (lambda path: path.write_bytes(KOREAN.encode()[::-1]), False),
    (lambda path: path.write_bytes(b"a"), False),
]


@pytest.mark.parametrize(("change", "same"), CHANGES)
def test_source_is_known_by_its_content(
    config: Config, tmp_path: Path, change: Callable[[Path], object], same: bool
) -> None:
    before = folder(config)
    change(tmp_path / "a text.txt")
    assert (folder(config) == before) is same


def test_large_source_is_known_by_size_and_time(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as stream:
        stream.truncate(65 << 20)
    before = folder(config, data__source=str(path))
    assert folder(config, data__source=str(path)) == before
    os.utime(path, (1, 1))
    assert folder(config, data__source=str(path)) != before


def test_the_split_has_the_runs_seed_unless_it_has_its_own(config: Config) -> None:
    assert folder(config, data__seed=config.seed) == folder(config)
    assert folder(config, data__seed=5, seed=6) == folder(config, seed=5) != folder(config)


def test_init_from_brings_its_tokenizer(config: Config, tmp_path: Path) -> None:
    train_bpe([KOREAN], 300).save(tmp_path / "run" / "model")
    named = folder(config, data__tokenizer=str(tmp_path / "run"))
    assert folder(config, model__init_from=str(tmp_path / "run")) == named


def test_remote_storage_path_is_a_mistake(config: Config) -> None:
    with pytest.raises(UserError, match="storage_path=s3://bucket"):
        folder(config, storage_path="s3://bucket")


def test_a_tokenizer_made_here_has_its_own_end_of_text(config: Config) -> None:
    with pytest.raises(UserError, match=r"data\.eos_token='</s>': a tokenizer made here \(bpe\)"):
        folder(config, data__eos_token="</s>")
    assert folder(config, data__eos_token="<|endoftext|>") == folder(config)
