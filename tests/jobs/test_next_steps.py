"""What jobs say at their end: settings in a line, and commands that can be typed."""

from __future__ import annotations

import json
import logging
import shlex
from functools import partial
from pathlib import Path

import pytest

from gptray.config import load_config, override
from gptray.jobs.folders.resuming import command
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.next_steps import (
    differing,
    of_model,
    resumable,
    settings_of,
    short_name,
    tell_run,
)
from gptray.jobs.serve.check import completion_command
from tests.jobs.test_listing import END, FALLING, OVERFITTED
from tests.reports.curves import config_of, rows_of, started, write_run

ROOT = Path(__file__).resolve().parents[2]


def told(
    storage: Path, caplog: pytest.LogCaptureFixture, losses: list[float]
) -> tuple[list[str], list[list[str]]]:
    """What is said of a finished run before its commands, and these, split as a shell does."""
    caplog.set_level(logging.INFO, "gptray")
    folder = storage / "run"
    folder.mkdir(parents=True)
    given = {"storage_path": str(storage), "name": "run", "optim.lr": 0.001}
    config = override(config_of(rows_of(losses)), given)
    write_run(folder, rows_of(losses), [started(), END], config)
    tell_run(config, folder)
    *said, following = caplog.messages
    return said, [shlex.split(line) for line in following.splitlines()[1:]]


def test_a_run_that_still_fell_names_the_command_that_trains_it_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said, (longer, written) = told(tmp_path / "my runs", caplog, FALLING)
    assert said[0].endswith("Try: more steps.")
    assert "optim.lr=0.001" in said[1] and "train.max_steps=80" in said[1]
    assert "storage_path" not in said[1]
    assert longer[:3] == ["python", "jobs/train.py", "--config"]
    config = resolve(load_config(longer[3], longer[4:]))
    assert (config.name, config.train.max_steps) == ("run", 160)
    assert written[2] == f"generate.model={tmp_path / 'my runs' / 'run'}"


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ([], "the defaults"),
        (["data.tokenizer=bpe"], "the defaults"),
        (["data.tokenizer=char"], "data.tokenizer=char"),
    ],
)
def test_a_resolved_config_names_only_settings_that_were_chosen(
    given: list[str], settings: str
) -> None:
    assert settings_of(differing(resolve(load_config(None, given)))) == settings


def test_a_run_that_overfits_names_what_tries_and_evaluates_its_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said, (written, evaluated) = told(tmp_path, caplog, OVERFITTED)
    assert said[0].startswith("Validation loss was best at step 60")
    assert written[1] == "jobs/generate.py"
    assert evaluated[1:] == ["jobs/evaluate.py", f"evaluate.model={tmp_path / 'run'}"]


def test_an_interrupted_run_says_where_it_is_and_what_resumes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    given = {"storage_path": str(tmp_path), "name": "run", "train.resume": "never"}
    config = override(config_of(rows_of(FALLING)), given)
    run = tmp_path / "run"

    def interrupt() -> None:
        resumes = partial(command, "train", config, run)
        with (
            pytest.raises(KeyboardInterrupt),
            resumable(run, resumes, begun=run / "config.yaml", steps=80),
        ):
            raise KeyboardInterrupt

    run.mkdir()
    interrupt()
    assert not caplog.messages, "nothing is there that could be resumed"
    write_run(run, rows_of(FALLING[:4]), [started()], config)
    interrupt()
    stopped, resume, again = caplog.messages[0].splitlines()
    assert (stopped, resume) == (f"stopped after step 40 of 80; results so far: {run}", "resume:")
    _, _, flag, path, auto = shlex.split(again)
    assert flag == "--config" and load_config(path, [auto]).train.resume == "auto"


def test_an_interrupted_batch_says_where_its_files_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    out = tmp_path / "out"
    for is_begun in (False, True):
        if is_begun:
            out.mkdir()
        with pytest.raises(SystemExit), resumable(out, lambda: "the command", begun=out):
            raise SystemExit(143)
    assert caplog.messages == [f"stopped; results so far: {out}\nresume:\n  the command"]


def test_settings_show_texts_with_their_names() -> None:
    config = load_config(None, ["evaluate.also={old: old.txt}"])
    assert settings_of(differing(config)) == "evaluate.also={old: 'old.txt'}"


def test_a_run_in_the_default_storage_path_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "gptray" / "ko-q"
    assert short_name(run) == "ko-q"
    (tmp_path / "ko-q").mkdir()
    (tmp_path / "ko-q" / "config.json").touch()
    assert short_name(run) == str(run)


@pytest.mark.parametrize("keys", [[], ["serve.api_key_file=keys.txt"]])
def test_the_endpoints_command_asks_for_a_text(keys: list[str]) -> None:
    config = load_config(None, keys)
    command = completion_command(config, "http://127.0.0.1:8000", '\uc61b\'s "book"')
    words = shlex.split(command)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == '\uc61b\'s "book"'
    assert ("Authorization: Bearer $KEY" in words) == bool(keys)


def test_a_gguf_file_is_named_by_its_path_again(tmp_path: Path) -> None:
    path = tmp_path / "book.gguf"
    path.write_bytes(b"GGUF")
    made = of_model(tmp_path / "cache" / "copied" / "0a1b", str(path))
    assert made["serve"].endswith(f"serve.model={path}")
