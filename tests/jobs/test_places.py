"""Runs that are resumed from another folder, or from the place that they were moved to."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from gptray.config import Config, UserError, load_config, load_saved
from gptray.jobs.folders.resuming import check_resumable, command, save_config
from gptray.jobs.folders.run_folder import resolve, run_dir
from gptray.jobs.runs.listing import listed


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder with text.txt, which is the working directory, and another one."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "text.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here", tmp_path / "there"


def begun(*words: str) -> Config:
    """A run's config, resolved, which its folder has."""
    config = resolve(load_config(None, ["storage_path=../runs", "name=book", *words]))
    run_dir(config).mkdir(parents=True)
    save_config(config, run_dir(config))
    return config


def test_a_saved_config_names_its_text_from_any_folder(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = folders
    config = begun('data.source=["text.txt", "*.md", "s3://bucket/*.txt"]', "data.val_source=v.txt")
    monkeypatch.chdir(there)
    again = resolve(load_config(str(run_dir(config) / "config.yaml"), []))
    assert again.data.source == [f"{here}/text.txt", f"{here}/*.md", "s3://bucket/*.txt"]
    assert again.data.val_source == f"{here}/v.txt"
    assert check_resumable(again) == []


def test_the_command_as_it_was_typed_resumes_too(folders: tuple[Path, Path]) -> None:
    config = begun("data.source=text.txt")
    assert load_saved(run_dir(config) / "config.yaml").data.source == str(folders[0] / "text.txt")
    assert check_resumable(config) == []
    other = resolve(
        load_config(None, ["storage_path=../runs", "name=book", "data.source=other.txt"])
    )
    with pytest.raises(UserError, match="data.source: '.*/text.txt' there, 'other.txt' now"):
        check_resumable(other)


def test_a_run_whose_config_has_a_relative_path_resumes(folders: tuple[Path, Path]) -> None:
    config = begun("data.source=text.txt")
    saved = run_dir(config) / "config.yaml"
    saved.write_text(saved.read_text().replace(str(folders[0]) + "/", ""))
    assert load_saved(saved).data.source == "text.txt"
    assert check_resumable(config) == []
    assert check_resumable(resolve(load_config(str(saved), []))) == []


def test_the_command_of_a_moved_run_names_its_place(folders: tuple[Path, Path]) -> None:
    config = begun("data.source=text.txt", "train.resume=never")
    before, moved = run_dir(config), folders[1] / "renamed"
    assert "name=" not in command("train", config, before)
    shutil.move(before, moved)
    (told,) = listed(load_config(None, [f"storage_path={folders[1]}"]))
    _, _, flag, path, *words = shlex.split(told.next)
    assert (flag, path) == ("--config", str(moved / "config.yaml"))
    resumed = resolve(load_config(path, words))
    assert run_dir(resumed) == moved and check_resumable(resumed) == []
