from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gptray.config import Config, UserError, override
from gptray.data.request import Request, make_request
from gptray.data.split import SPLITS, TEST, TRAIN, VAL
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


def test_the_chat_template_matters_wherever_it_is_kept(config: Config, tmp_path: Path) -> None:
    saved = tmp_path / "tokenizer"
    train_bpe([KOREAN], 300).save(saved)
    bare = folder(config, data__tokenizer=str(saved))
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    first = folder(config, data__tokenizer=str(saved))
    (saved / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert len({bare, first, folder(config, data__tokenizer=str(saved))}) == 3


def test_init_from_brings_its_tokenizer(config: Config, tmp_path: Path) -> None:
    train_bpe([KOREAN], 300).save(tmp_path / "run" / "model")
    named = folder(config, data__tokenizer=str(tmp_path / "run"))
    assert folder(config, model__init_from=str(tmp_path / "run")) == named


def test_a_tokenizer_made_here_has_its_own_end_of_text(config: Config) -> None:
    with pytest.raises(UserError, match=r"data\.eos_token='</s>': a tokenizer made here \(bpe\)"):
        folder(config, data__eos_token="</s>")
    assert folder(config, data__eos_token="<|endoftext|>") == folder(config)


def asked(config: Config, **data: object) -> Request:
    return make_request(override(config, {f"data.{key}": value for key, value in data.items()}))


def test_text_of_its_own_leaves_the_other_shares_in_proportion(
    config: Config, tmp_path: Path
) -> None:
    held = str(write_bytes(tmp_path / "held.txt", b"other text"))
    more = str(write_bytes(tmp_path / "more.txt", b"more text"))
    halves: list[tuple[dict[str, object], list[dict[int, float]]]] = [
        ({"val_source": held}, [{TRAIN: 1.0}, {VAL: 1.0}]),
        ({"val_source": held, "split": "80:10:10"},
         [{TRAIN: 8 / 9, TEST: 1 / 9}, {VAL: 1.0}]),
        ({"test_source": held}, [{TRAIN: 0.9, VAL: 0.1}, {TEST: 1.0}]),
        ({"val_source": held, "test_source": [more]}, [{TRAIN: 1.0}, {VAL: 1.0}, {TEST: 1.0}]),
    ]  # fmt: skip
    for changes, expected in halves:
        request = asked(config, **changes)
        assert [shares for _, shares in request.sources] == [
            pytest.approx(shares) for shares in expected
        ]
        labels = {label for shares in expected for label in shares}
        assert request.split_names == SPLITS[: max(labels) + 1]
        assert request.data_dir != asked(config).data_dir


def test_file_in_both_is_held_out_and_said_once(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    train, val = (write_bytes(folder / f"{name}.txt", name.encode()) for name in ("train", "val"))
    (tmp_path / "link.txt").symlink_to(val)
    request = asked(config, source=str(folder), val_source=str(tmp_path / "link.txt"))
    assert [file.path for file in request.source.files] == [str(train)]
    assert request.warnings == (f"{val}: in both data.source and data.val_source; not trained on",)
    with pytest.raises(UserError, match="all of its files are also in data.val_source"):
        asked(config, source=str(val), val_source=str(folder))
    with pytest.raises(UserError, match="is also in data.val_source; keep it in only one"):
        asked(config, source=str(train), val_source=str(val), test_source=[str(val)])


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["train.txt", "val.txt"], "data.val_source"),
        (["train-00000.txt", "validation-00000.txt"], "data.val_source"),
        (["wiki.train.txt", "dev_set.txt"], "data.val_source"),
        (["train.txt", "test.txt"], "data.test_source"),
        (["book.txt", "valley.txt", "testament.txt", "devil.txt"], None),
        (["val.txt"], None),
    ],
)
def test_files_called_like_splits_are_pointed_out(
    config: Config, tmp_path: Path, names: list[str], key: str | None
) -> None:
    (tmp_path / "folder").mkdir()
    for name in names:
        write_bytes(tmp_path / "folder" / name, name.encode())
    warnings = asked(config, source=str(tmp_path / "folder")).warnings
    assert len(warnings) == (key is not None)
    if key:
        assert f"{key}={tmp_path}/folder/{names[1]}" in warnings[0]


def test_separator_and_encoding_ask_for_another_folder(config: Config) -> None:
    plain = asked(config).data_dir
    assert asked(config, separator="<|endoftext|>").data_dir != plain
    assert asked(config, encoding="cp949").data_dir != plain
    assert asked(config, encoding="UTF8").data_dir == plain
