"""Checkpoints: whole or not visible, and honest about damage done to them later."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from gptray.config import RunFailed
from gptray.training.checkpoint import (
    damage,
    find_checkpoints,
    newest_intact,
    prune,
    publish_folder,
    replace_model,
    save_checkpoint,
)
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState
from tests.full_disk import files_up_to


def save(run_dir: Path, step: int, *, weights: bytes = b"weights") -> Path:
    def write_tensors(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").write_bytes(weights * 50)
        (folder / "optimizer.safetensors").write_bytes(b"moments")

    return save_checkpoint(
        run_dir,
        TrainerState(step=step, progress=EarlyStopping(), data="d"),
        config_yaml="seed: 1\n",
        write_tensors=write_tensors,
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20):
        save(tmp_path, step)
    return tmp_path


def test_saved_checkpoint_is_whole_and_tells_its_state(run_dir: Path) -> None:
    folder, problems = newest_intact(run_dir)
    assert folder == run_dir / "checkpoint_000020" and problems == []
    assert TrainerState.load(folder).step == 20
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}


def test_a_checkpoint_without_a_mark_of_its_evaluation_was_made_at_one(run_dir: Path) -> None:
    path = run_dir / "checkpoint_000020" / "trainer.json"
    state = json.loads(path.read_text())
    del state["evaluated"], state["losses"]
    path.write_text(json.dumps(state))
    assert TrainerState.load(path.parent).evaluated == 20


def test_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) == (None, [])
    assert newest_intact(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "optimizer.safetensors", "trainer.json", "config.yaml"]
)
@pytest.mark.parametrize("fault", ["truncate", "empty", "remove", "grow"])
def test_damaged_file_is_named_and_the_one_before_is_used(
    run_dir: Path, file: str, fault: str
) -> None:
    path = run_dir / "checkpoint_000020" / file
    content = path.read_bytes()
    if fault == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": content[:-1], "empty": b"", "grow": content + b"x"}[fault])
    folder, problems = newest_intact(run_dir)
    assert folder == run_dir / "checkpoint_000010"
    assert len(problems) == 1 and "checkpoint_000020" in problems[0] and file in problems[0]


def test_every_flipped_bit_is_found(run_dir: Path) -> None:
    rng = random.Random(0)
    folder = run_dir / "checkpoint_000020"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for _ in range(100):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        bit = rng.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found = damage(folder)
        assert found is not None and path.name in found
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    assert damage(folder) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"format": 99, "files": {}}'])
def test_damaged_manifest_is_damage(run_dir: Path, text: str | None) -> None:
    manifest = run_dir / "checkpoint_000020" / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_text(text)
    folder, problems = newest_intact(run_dir)
    assert folder == run_dir / "checkpoint_000010"
    assert "manifest.json" in problems[0]


def test_no_whole_checkpoint_stops_and_says_what_was_tried(run_dir: Path) -> None:
    (run_dir / "checkpoint_000010" / "trainer.json").unlink()
    shutil.rmtree(run_dir / "checkpoint_000020" / "model")
    with pytest.raises(RunFailed) as caught:
        newest_intact(run_dir)
    message = str(caught.value)
    assert "checkpoint_000010" in message and "trainer.json is missing" in message
    assert "checkpoint_000020" in message and "model/config.json is missing" in message


def test_half_written_checkpoint_is_invisible_and_written_anew(run_dir: Path) -> None:
    class Killed(BaseException):
        pass

    def die(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        save_checkpoint(
            run_dir,
            TrainerState(step=30, progress=EarlyStopping(), data="d"),
            config_yaml="",
            write_tensors=die,
        )
    assert [folder.name for folder in find_checkpoints(run_dir)] == [
        "checkpoint_000020",
        "checkpoint_000010",
    ]
    assert damage(save(run_dir, 30)) is None


def test_damaged_checkpoint_made_again_is_kept_aside(run_dir: Path) -> None:
    (run_dir / "checkpoint_000020" / "trainer.json").write_text("precious")
    assert damage(save(run_dir, 20)) is None
    aside = run_dir / "checkpoint_000020.damaged-1"
    assert (aside / "trainer.json").read_text() == "precious"
    assert [folder.name for folder in find_checkpoints(run_dir)] == [
        "checkpoint_000020",
        "checkpoint_000010",
    ]


def test_full_disk_names_the_path_and_keeps_what_is_there(run_dir: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match="checkpoint_000030: No space left on device .*bytes free"):
        save_checkpoint(
            run_dir,
            TrainerState(step=30, progress=EarlyStopping(), data="d"),
            config_yaml="",
            write_tensors=full,
        )
    assert newest_intact(run_dir)[0] == run_dir / "checkpoint_000020"


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    prune(tmp_path, 2, spare={20})
    names = [folder.name for folder in find_checkpoints(tmp_path)]
    assert names == ["checkpoint_000050", "checkpoint_000040", "checkpoint_000020"]
    assert not list(tmp_path.glob(".checkpoint_*"))


def test_prune_finishes_what_a_kill_left(tmp_path: Path) -> None:
    save(tmp_path, 10).rename(tmp_path / ".checkpoint_000010.old")
    save(tmp_path, 20)
    prune(tmp_path, 2, spare={20})
    assert not list(tmp_path.glob(".checkpoint_*"))


def test_model_of_another_shape_takes_the_place_of_the_whole_folder(tmp_path: Path) -> None:
    sweep, other = tmp_path / "sweep", tmp_path / "other"
    for folder in (sweep, other):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / f"{folder.name}.json").write_text("{}")
    replace_model(other, sweep)
    assert [path.name for path in (sweep / "model").iterdir()] == ["other.json"]
    assert [path.name for path in sweep.iterdir()] == ["model"]
    (other / "model" / "big").write_bytes(b"x" * 5000)
    with files_up_to(1000), pytest.raises(RunFailed, match="cannot write .*sweep/model"):
        replace_model(other, sweep)
    assert [path.name for path in (sweep / "model").iterdir()] == ["other.json"]
    assert [path.name for path in sweep.iterdir()] == ["model"]


def test_published_model_is_replaced_file_by_file(tmp_path: Path) -> None:
    publish_folder(save(tmp_path, 10, weights=b"old") / "model", tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("rb") as reader:
        publish_folder(save(tmp_path, 20, weights=b"new") / "model", tmp_path / "model")
        assert reader.read() == b"old" * 50  # whoever has it open goes on reading a whole file
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"new" * 50
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
