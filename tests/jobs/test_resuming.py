"""What may change in a run or sweep that is there, without Ray."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptray.config import Config, RunFailed, UserError, load_config
from gptray.data.tokenizer import char_tokenizer
from gptray.jobs.folders.places import check_storage
from gptray.jobs.folders.resuming import (
    check_free,
    check_resumable,
    how_to_train_longer,
    save_config,
)
from gptray.jobs.folders.run_folder import resolve, run_dir
from gptray.jobs.tune.check import check as check_sweep
from gptray.jobs.tune.check import how_to_extend
from gptray.jobs.tune.start import check_trials, opened
from gptray.storage.driver_lock import held
from gptray.storage.record import METRICS, write_event
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState
from gptray.tuning.more_trials import StoppedEarly
from gptray.tuning.sweep_record import Record, load_sweep, load_trials, published_dir, trial_dir
from gptray.tuning.trial_plan import text_key
from tests.data.prepared import prepared_here
from tests.tiny import tiny_config, tiny_text
from tests.training.runs import run

SPACE = "tune.space=[{path: optim.lr, loguniform: [1e-3, 1e-2]}]"


def config_of(storage: Path, *keys: str) -> Config:
    values = dict(key.split("=", 1) for key in (f"storage_path={storage}", "name=run", *keys))
    return resolve(load_config(None, [f"{key}={value}" for key, value in values.items()]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 100 steps that is finished, by its files."""
    config = config_of(tmp_path, "train.max_steps=100")
    folder = run_dir(config)
    folder.mkdir()
    save_config(config, folder)
    (folder / METRICS).write_text(json.dumps({"step": 100}) + "\n", "utf-8")
    (folder / "checkpoint_000100").mkdir()
    return folder


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "train.max_steps=200",
            "train.max_steps raised from 100 to 200: the schedule is planned again from step 100",
        ),
        ("train.patience=9", "train.patience changed from 5 to 9"),
        ("train.patience=null", "train.patience changed from 5 to null"),
        ("train.min_delta=0.5", "train.min_delta changed from 0.0 to 0.5"),
    ],
)
def test_what_trains_longer_may_change_and_is_told(folder: Path, key: str, sentence: str) -> None:
    config = config_of(folder.parent, "train.max_steps=100", key)
    assert check_resumable(config) == [sentence]
    before = (folder / "config.yaml").read_bytes()
    save_config(config, folder)
    assert load_config(str(folder / "config.yaml"), []) == config
    assert (folder / "config.1.yaml").read_bytes() == before
    assert check_resumable(config) == []
    save_config(config, folder)
    assert not (folder / "config.2.yaml").exists()


def test_auto_is_the_same_setting_as_what_it_means(folder: Path) -> None:
    """A run of before train.compile=auto says false, which is what auto is on a CPU."""
    saved = folder / "config.yaml"
    saved.write_text(saved.read_text("utf-8").replace("compile: auto", "compile: false"), "utf-8")
    assert load_config(str(saved), []).train.compile is False
    now = config_of(folder.parent, "train.max_steps=100")
    assert now.train.compile == "auto" and check_resumable(now) == []
    compiled = config_of(folder.parent, "train.max_steps=100", "train.compile=true")
    with pytest.raises(UserError, match="train.compile: false there, true now"):
        check_resumable(compiled)
    exact = config_of(folder.parent, "train.max_steps=100", "train.deterministic=true")
    with pytest.raises(UserError, match="train.deterministic: false there, true now"):
        check_resumable(exact)


def test_no_column_is_the_same_setting_as_the_column_text(folder: Path) -> None:
    steps = "train.max_steps=100"
    saved = (folder / "config.yaml").read_text("utf-8")
    assert "text_column: null" in saved
    older = saved.replace("text_column: null", "text_column: text")
    (folder / "config.yaml").write_text(older, "utf-8")
    assert check_resumable(config_of(folder.parent, steps)) == []
    with pytest.raises(UserError, match=r"data\.text_column: '?text'? there, '?body'? now"):
        check_resumable(config_of(folder.parent, steps, "data.text_column=body"))


def test_a_least_rate_of_the_same_value_is_the_same_setting(folder: Path, tmp_path: Path) -> None:
    """A run of before optim.min_lr=null says 0.0002, which is what null is for its optim.lr."""

    def began_before(folder: Path) -> None:
        saved = folder / "config.yaml"
        saved.write_text(
            saved.read_text("utf-8").replace("min_lr: null", "min_lr: 0.0002"), "utf-8"
        )
        assert load_config(str(saved), []).optim.min_lr == 2e-4

    began_before(folder)
    assert check_resumable(config_of(folder.parent, "train.max_steps=100")) == []
    with pytest.raises(UserError, match="optim.min_lr: 0.0002 there, null now"):
        check_resumable(config_of(folder.parent, "train.max_steps=100", "optim.lr=0.001"))
    sweep = sweep_of(tmp_path)
    sweep.folder.mkdir()
    save_config(sweep.config, sweep.folder)
    began_before(sweep.folder)
    with pytest.raises(UserError, match="optim.min_lr: 0.0002 there, null now"):
        sweep_of(tmp_path)
    assert sweep_of(tmp_path, "optim.min_lr=2e-4").changes == []


@pytest.mark.parametrize(
    ("keys", "bad_evals", "words"),
    [
        ([], 0, ["train.max_steps=200"]),
        (["train.max_steps=500", "train.patience=2"], 7, ["train.patience=14"]),
        (["train.patience=2"], 3, ["train.max_steps=200", "train.patience=6"]),
        (["train.resume=never"], 0, ["train.max_steps=200", "train.resume=auto"]),
    ],
)
def test_the_command_that_trains_a_finished_run_longer_does(
    tmp_path: Path, keys: list[str], bad_evals: int, words: list[str]
) -> None:
    config = config_of(tmp_path / "my runs", "train.max_steps=100", *keys)
    folder = run_dir(config)
    folder.mkdir(parents=True)
    save_config(config, folder)
    (folder / "checkpoint_000100").mkdir()
    state = TrainerState(100, EarlyStopping(bad_evals=bad_evals), data="")
    told = how_to_train_longer(config, folder, state)
    typed = shlex.split(told.partition("longer: ")[2].partition(";")[0])
    assert typed == ["python", "jobs/train.py", "--config", str(folder / "config.yaml"), *words]
    longer = resolve(load_config(typed[3], typed[4:]))
    assert check_resumable(longer) and state.why_stop(longer) is None


def test_schedule_without_an_end_is_not_planned_anew(tmp_path: Path) -> None:
    keys = ("optim.schedule=constant", "train.max_steps=100")
    config = config_of(tmp_path, *keys)
    run_dir(config).mkdir()
    save_config(config, run_dir(config))
    longer = config_of(tmp_path, *keys, "train.max_steps=200")
    assert check_resumable(longer) == ["train.max_steps raised from 100 to 200"]


def test_fewer_steps_than_were_made_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"train.max_steps=99: .* has already made 100 steps"):
        check_resumable(config_of(folder.parent, "train.max_steps=99"))


def test_other_settings_are_refused_as_ever(folder: Path) -> None:
    with pytest.raises(UserError, match=r"optim.lr: 0.002 there, 0.5 now"):
        check_resumable(config_of(folder.parent, "train.max_steps=200", "optim.lr=0.5"))


@pytest.mark.parametrize("trace", ["model", "evaluated"])
def test_run_whose_checkpoints_are_gone_is_refused(folder: Path, trace: str) -> None:
    (folder / "checkpoint_000100").rmdir()
    config = config_of(folder.parent, "train.max_steps=100")
    assert check_resumable(config) == []  # killed before its first checkpoint
    if trace == "model":
        (folder / "model").mkdir()
    else:
        write_event(folder, "evaluated", step=100, best=True, samples=[])
    with pytest.raises(UserError, match=r"checkpoints .* are gone.*train.resume=never") as caught:
        check_resumable(config)
    assert (f"model.init_from={folder / 'model'}" in str(caught.value)) == (trace == "model")


def test_folder_that_is_held_is_refused_without_holding_it(tmp_path: Path) -> None:
    check_free(tmp_path)
    with held(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is training the run"):
            check_free(tmp_path / "run")
        (tmp_path / "run" / METRICS).touch()
    check_free(tmp_path / "run")


def test_start_that_failed_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), held(tmp_path / "run"):
        raise UserError("training text is too short")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_does_not_hide_what_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="cannot write"), held(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        raise RunFailed("cannot write metrics.jsonl")


@pytest.mark.parametrize("key", ["serve.port=9000", "generate.max_batch_size=4"])
def test_settings_of_other_jobs_do_not_keep_a_run_or_sweep_from_resuming(
    folder: Path, tmp_path: Path, key: str
) -> None:
    assert check_resumable(config_of(folder.parent, "train.max_steps=100", key)) == []
    sweep = sweep_of(tmp_path)
    sweep.folder.mkdir()
    save_config(sweep.config, sweep.folder)
    assert sweep_of(tmp_path, key).changes == []


def sweep_of(tmp_path: Path, *keys: str) -> Any:
    words = [f"storage_path={tmp_path}", "name=sweep", "compute.cpus_per_worker=1", *keys]
    if not any(key.startswith("tune.space=") for key in keys):
        words.append(SPACE)
    return check_sweep(load_config(None, words))


def test_more_trials_leave_those_that_are_there(tmp_path: Path) -> None:
    first = sweep_of(tmp_path, "tune.num_samples=4")
    first.folder.mkdir()
    save_config(first.config, first.folder)
    record = Record(first.folder)
    for one in first.trials:
        record.write("planned", trial=one.name, values=one.values, max_steps=10)
    record.write("planned", trial="0005", values={"seed": 9}, max_steps=10, replicate_of="0001")
    record.write("winner", trial="0001")
    more = sweep_of(tmp_path, "tune.num_samples=7")
    assert more.changes == [
        "tune.num_samples raised from 4 to 7: existing trials stay, and the winner is chosen again"
    ]
    assert more.trials[:5] == first.trials
    # The name of a repetition is taken.
    assert [one.name for one in more.trials[5:]] == ["0006", "0007", "0008"]
    record.write("reopened", before=4, num_samples=7)
    save_config(more.config, more.folder)
    assert load_sweep(more.folder).winner is None and len(load_trials(more.folder)) == 6
    assert published_dir(more.folder) == trial_dir(more.folder, "0001")
    again = sweep_of(tmp_path, "tune.num_samples=7")
    assert (again.trials, again.changes) == (more.trials, [])
    # Another three are not those that would be drawn at once.
    third = sweep_of(tmp_path, "tune.num_samples=9")
    assert third.trials[:8] == more.trials and len(third.trials) == 10
    with pytest.raises(UserError, match=r"tune.num_samples=6: .* has already drawn 7"):
        sweep_of(tmp_path, "tune.num_samples=6")


def test_a_sweep_in_a_store_is_named_by_its_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = ["storage_path=s3://bucket", "name=s", SPACE]
    config = resolve(load_config(None, [*keys, "tune.num_samples=4"]), sweep=True)
    folder = run_dir(config)
    folder.mkdir(parents=True)
    save_config(config, folder)
    fewer = resolve(load_config(None, [*keys, "tune.num_samples=3"]), sweep=True)
    with pytest.raises(UserError, match="the sweep s3://bucket/s has already drawn 4"):
        check_resumable(fewer, sweep=True)


def test_a_sweep_that_stopped_itself_goes_on_with_another_min_gain(tmp_path: Path) -> None:
    first = sweep_of(tmp_path, "tune.num_samples=4")
    first.folder.mkdir()
    record = opened(first)
    for one in first.trials:
        record.write("planned", trial=one.name, values=one.values, max_steps=10)
    for one in first.trials[:3]:
        record.write("ended", trial=one.name, outcome="finished", step=10)
    record.write("enough", trials=3, of=5, gain=0.001, gain_at_most=0.002, min_gain=0.01)
    for one in first.trials[3:]:
        record.write("ended", trial=one.name, outcome="skipped", step=0)
    opened(sweep_of(tmp_path, "tune.num_samples=4"))  # killed before there was a winner
    assert [one.outcome for one in load_trials(first.folder)][3:] == ["skipped"] * 2
    record.write("winner", trial="0001")
    assert len(load_sweep(first.folder).trials) == 3
    told = how_to_extend(sweep_of(tmp_path, "tune.num_samples=4"))
    assert "it stopped itself after 3 of 5 trials; to run the others: " in told
    assert " tune.min_gain=0; " in told
    whole = sweep_of(tmp_path, "tune.num_samples=4", "tune.min_gain=0")
    assert whole.changes == [
        "tune.min_gain changed from 0.01 to 0.0: "
        "the sweep judges again whether more trials are worth it"
    ]
    assert whole.trials == first.trials
    opened(whole)
    assert [one.outcome for one in load_trials(first.folder)] == ["finished"] * 3 + [None] * 2
    assert StoppedEarly.of_sweep(first.folder) is None
    assert sweep_of(tmp_path, "tune.num_samples=4", "tune.min_gain=0").changes == []


@pytest.mark.parametrize("outcome", ["finished", "stopped", None])
def test_more_trials_on_a_text_that_has_changed_are_refused(
    tmp_path: Path, outcome: str | None
) -> None:
    text = tiny_text(300)
    (tmp_path / "text.txt").write_text(text)
    keys = ("train.max_steps=2", "train.eval_interval=2", f"name=sweep{outcome}", SPACE)
    checked = check_sweep(tiny_config(tmp_path / "text.txt", tmp_path, *keys))
    before, now = (
        prepared_here(tmp_path / name, char_tokenizer(text), train=text, val=val)
        for name, val in (("before", text[:900]), ("now", text[:600]))
    )
    first = checked.trials[0]
    run(first.config, before, trial_dir(checked.folder, first.name))
    record = Record(checked.folder)
    record.write("planned", trial=first.name, values=first.values, max_steps=2)
    if outcome:
        record.write("ended", trial=first.name, outcome=outcome, step=2)
    key = text_key(first.config)
    check_trials(checked, {key: before})
    with pytest.raises(UserError, match="trial 0000: the text or tokenizer of the run 0000 has ch"):
        check_trials(checked, {key: now})


@pytest.mark.parametrize(
    ("space", "has_more"),
    [
        ("[{path: optim.lr, loguniform: [1e-3, 1e-2]}]", True),
        ("[{path: optim.lr, grid: [1e-3, 1e-2]}]", False),
        ("[{path: optim.lr, grid: [1e-3, 1e-2]}, {path: model.dropout, uniform: [0, 0.5]}]", True),
        ("[{path: optim.lr, choice: [1e-3, 1e-2]}]", False),
    ],
)
def test_a_finished_sweep_offers_more_trials_if_its_space_has_more(
    tmp_path: Path, space: str, has_more: bool
) -> None:
    first = sweep_of(tmp_path, f"tune.space={space}", "tune.num_samples=4")
    first.folder.mkdir()
    save_config(first.config, first.folder)
    told = how_to_extend(sweep_of(tmp_path, f"tune.space={space}", "tune.num_samples=4"))
    if not has_more:
        assert told.startswith("this sweep is finished and has tried its whole space; ")
        return
    words = shlex.split(told.partition("more trials: ")[2].partition(";")[0])
    assert words[:3] == ["python", "jobs/tune.py", "--config"]
    more = check_sweep(load_config(words[3], words[4:]))
    assert more.config.tune.num_samples == 8 and len(more.trials) > len(first.trials)


@pytest.mark.parametrize("source", ["texts", "texts/**/*.txt"])
def test_storage_among_the_texts_is_refused(tmp_path: Path, source: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text", "utf-8")
    (tmp_path / "link").symlink_to(texts)
    for storage in (texts, texts / "out", tmp_path / "link" / "out"):
        config = config_of(storage, f"data.source={tmp_path / source}")
        with pytest.raises(UserError, match=r"storage_path=.* lies in data.source=.*would become"):
            check_storage(config)
    for storage in (tmp_path / "out", texts / ".hidden", tmp_path / "texts-2"):
        check_storage(config_of(storage, f"data.source={tmp_path / source}"))
    check_storage(config_of(texts, f"data.source={texts}/*.txt"))
    check_storage(config_of(texts, f"data.source={texts}/a.txt"))


def test_storage_among_texts_to_evaluate_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "out", f"evaluate.source={tmp_path}")
    with pytest.raises(UserError, match=r"storage_path=.* lies in evaluate.source="):
        check_storage(config)
