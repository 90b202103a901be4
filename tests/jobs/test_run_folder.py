"""A run's folder without Ray: names, shapes taken over, who may write."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptray.config import ModelConfig, UserError, load_config
from gptray.jobs.folders.resuming import check_resumable
from gptray.jobs.folders.run_folder import (
    resolve,
    run_dir,
    run_place,
    set_ray_snapshot_aside,
)
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.storage.driver_lock import LOCK, held, is_held


def test_name_follows_from_what_is_trained_only(tmp_path: Path) -> None:
    base = [f"storage_path={tmp_path}"]
    name = resolve(load_config(None, base)).name
    assert name == "builtin-89c43d"  # whatever keys later versions add
    assert resolve(load_config(None, [*base, "compute.num_workers=2"])).name == name
    assert resolve(load_config(None, [*base, "optim.lr=3e-4"])).name != name


def test_resolving_twice_changes_nothing(tmp_path: Path) -> None:
    once = resolve(load_config(None, [f"storage_path={tmp_path}"]))
    assert resolve(once) == once


def test_new_run_of_the_same_config_gets_a_free_name(tmp_path: Path) -> None:
    config = load_config(None, [f"storage_path={tmp_path}", "train.resume=never"])
    first = resolve(config)
    run_dir(first).mkdir()
    assert resolve(config).name == f"{first.name}-2"


def test_shape_and_tokenizer_come_from_init_from(tmp_path: Path) -> None:
    shape = ModelConfig(n_layer=3, n_head=2, n_embd=12, n_positions=40, dropout=0.3)
    save_pretrained(GPT(shape, vocab_size=99), tmp_path / "old")
    config = resolve(
        load_config(
            None,
            [f"storage_path={tmp_path}", f"model.init_from={tmp_path}/old", "train.block_size=16"],
        )
    )
    assert (config.model.n_layer, config.model.n_embd, config.model.vocab_size) == (3, 12, 99)
    assert config.model.dropout == 0.3
    assert config.data.tokenizer == str(tmp_path / "old")


def test_block_longer_than_the_model_that_was_taken_over_is_refused(tmp_path: Path) -> None:
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8)
    save_pretrained(GPT(shape, vocab_size=9), tmp_path / "old")
    with pytest.raises(UserError, match=r"train\.block_size=128 .* model\.n_positions=8"):
        resolve(load_config(None, [f"model.init_from={tmp_path}/old"]))


def test_a_run_at_home_in_object_storage_is_made_in_a_folder_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = resolve(load_config(None, ["storage_path=s3://bucket/", "name=r"]))
    assert run_place(config) == "s3://bucket/r"
    assert run_dir(config).is_relative_to(tmp_path) and run_dir(config).name == "r"


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    config = resolve(load_config(None, [f"storage_path=file://{tmp_path}/a%20b", "name=r"]))
    assert run_dir(config) == tmp_path / "a b" / "r"
    with pytest.raises(UserError, match="file://tmp/a: a path follows file:// from its root"):
        resolve(load_config(None, ["storage_path=file://tmp/a", "name=r"]))


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    config = resolve(load_config(None, [f"storage_path={tmp_path}", "name=letters"]))
    (tmp_path / "letters").mkdir()
    check_resumable(config)
    (tmp_path / "letters" / "dear.txt").write_text("...")
    with pytest.raises(UserError, match="not a run"):
        check_resumable(config)


def test_second_driver_of_a_run_is_refused(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="another process"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_a_driver_that_ends_just_now_holds_nothing(tmp_path: Path) -> None:
    over = threading.Event()

    def start_and_end() -> None:
        while not over.is_set():
            (tmp_path / LOCK).touch()
            (tmp_path / LOCK).unlink()

    with ThreadPoolExecutor(1) as pool:
        driver = pool.submit(start_and_end)
        try:
            assert not any([is_held(tmp_path) for _ in range(3000)])
        finally:
            over.set()
        driver.result()


@pytest.mark.parametrize(
    ("snapshot", "is_torn"),
    [
        ("", True),
        ('{"ray_version": "2.', True),
        ("[]", True),
        ('{"checkpoint_results": []}', False),
    ],
)
def test_ray_never_starts_over_an_old_snapshot(
    tmp_path: Path, snapshot: str, is_torn: bool
) -> None:
    path = tmp_path / "checkpoint_manager_snapshot.json"
    path.write_text(snapshot)
    line = set_ray_snapshot_aside(tmp_path)
    assert (line is not None and "was torn" in line) == is_torn
    assert not path.exists()
    assert set_ray_snapshot_aside(tmp_path) is None
