"""Training on a real Ray: outcome, going on, refusals, and a text that changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptray.config import Config, RunFailed, UserError, load_config, override
from gptray.jobs.train.check import check
from gptray.jobs.train.run import train
from gptray.storage.record import EVENTS, read_rows
from tests.jobs.tracker import exits
from tests.processes import before_long, ray_workers
from tests.tiny import tiny_config, tiny_text

pytestmark = pytest.mark.usefixtures("ray_cluster")


def named(text_file: Path, storage: Path, name: str, *overrides: str) -> Config:
    return tiny_config(text_file, storage, f"name={name}", *overrides)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of this file's own, which a test may change."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(tiny_text())
    return path


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """A run of two workers that went to its end, and its JSON line."""
    storage = tmp_path_factory.mktemp("finished")
    result = train(named(text_file, storage, "done", "compute.num_workers=2"))
    return storage, result


def test_two_workers_train_and_the_outcome_says_how(
    finished: tuple[Path, dict[str, object]],
) -> None:
    storage, result = finished
    promised = [
        "run_dir",
        "model_dir",
        "step",
        "best_step",
        "train_loss",
        "val_loss",
        "val_ppl",
        "val_bpb",
    ]
    assert {*promised, "stopped", "tokens_per_sec", "report"} <= set(result)
    assert result["run_dir"] == str(storage / "done")
    assert result["step"] == 20 and result["stopped"] == "max_steps"
    json.dumps(result, allow_nan=False)


def test_run_folder_has_what_is_promised(finished: tuple[Path, dict[str, object]]) -> None:
    run_dir = finished[0] / "done"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 21))
    assert load_config(str(run_dir / "config.yaml"), []).name == "done"
    assert list((run_dir / "tensorboard" / run_dir.name).glob("*/events.out.*"))
    page = (run_dir / "report.html").read_text("utf-8")
    assert finished[1]["report"] == str(run_dir / "report.html")
    assert "<b>finished</b> after 20 steps" in page and 'http-equiv="refresh"' not in page
    assert "Validation loss" in page and (run_dir / "loss.png").is_file()
    newest = run_dir / "checkpoint_000020"
    assert {path.name for path in newest.iterdir()} == {
        "model",
        "optimizer.safetensors",
        "trainer.json",
        "config.yaml",
        "manifest.json",
    }
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


def test_model_folder_opens_in_transformers(finished: tuple[Path, dict[str, object]]) -> None:
    folder = str(finished[1]["model_dir"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = "the old king sees a dog.\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.0  # it has learnt something: log(vocabulary) is above 3


def test_same_command_again_reports_the_finished_run(
    finished: tuple[Path, dict[str, object]], text_file: Path
) -> None:
    storage, result = finished
    before = (storage / "done" / "metrics.jsonl").read_bytes()
    again = train(named(text_file, storage, "done", "compute.num_workers=2"))
    assert {key: again[key] for key in again} == {key: result[key] for key in again}
    assert (storage / "done" / "metrics.jsonl").read_bytes() == before


def test_other_settings_under_the_same_name_are_refused_by_key(
    finished: tuple[Path, dict[str, object]], text_file: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(named(text_file, finished[0], "done", "optim.lr=0.5", "model.n_layer=1"))
    assert "optim.lr: 0.01 there, 0.5 now" in str(caught.value)
    assert "model.n_layer: 2 there, 1 now" in str(caught.value)
    assert "train.max_steps" not in str(caught.value)


def test_resume_never_refuses_an_existing_run(
    finished: tuple[Path, dict[str, object]], text_file: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.resume=never"):
        train(named(text_file, finished[0], "done", "train.resume=never"))


@pytest.fixture
def copy(finished: tuple[Path, dict[str, object]], text_file: Path, tmp_path: Path) -> Config:
    """The config of a copy of the finished run, which a test may damage; one worker is enough."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return named(text_file, tmp_path / "copy", "done")


def folder_of(config: Config) -> Path:
    return Path(config.storage_path) / "done"


def test_torn_ray_snapshot_does_not_stop_a_run(
    finished: tuple[Path, dict[str, object]], copy: Config, caplog: pytest.LogCaptureFixture
) -> None:
    # So that there is work left.
    (folder_of(copy) / "checkpoint_000020" / "trainer.json").unlink()
    (folder_of(copy) / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.')
    with caplog.at_level("WARNING", logger="gptray"):
        again = train(override(copy, {"compute.num_workers": 2}))
    assert again["val_loss"] == finished[1]["val_loss"]
    assert "checkpoint_000020 is damaged: trainer.json is missing" in caplog.text
    assert "checkpoint_manager_snapshot.json was torn" in caplog.text


def test_checkpoint_that_cannot_be_written_ends_the_run_once_and_the_same_command_resumes(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = named(text_file, tmp_path, "run", "train.max_steps=4", "train.eval_interval=2")
    run_dir = tmp_path / "run"
    in_the_way = run_dir / ".checkpoint_000004.tmp"
    run_dir.mkdir()
    os.mkfifo(in_the_way)  # neither a file nor a folder, which a killed attempt could leave
    message = r"cannot write .*checkpoint_000004: it is neither a file .*the same command resumes"
    with pytest.raises(RunFailed, match=message):
        train(config)
    told = [event["event"] for event in read_rows(run_dir / EVENTS)]
    assert told.count("start") == 1 and told[-1] == "failure"
    in_the_way.unlink()
    assert train(config)["stopped"] == "max_steps"
    with caplog.at_level("INFO", logger="gptray"):
        assert train(config)["step"] == 4
        assert f"--config {run_dir / 'config.yaml'} train.max_steps=8" in caplog.text
        longer = train(override(config, {"train.max_steps": 6}))
    assert (longer["step"], longer["stopped"]) == (6, "max_steps")
    change = "train.max_steps raised from 4 to 6: the schedule is planned again from step 4"
    assert change in caplog.text
    assert change in [event.get("message") for event in read_rows(run_dir / EVENTS)]
    assert load_config(str(run_dir / "config.yaml"), []).train.max_steps == 6
    assert load_config(str(run_dir / "config.1.yaml"), []).train.max_steps == 4
    with pytest.raises(UserError, match="has already made 6 steps"):
        check(override(config, {"train.max_steps": 5}))


def test_all_checkpoints_damaged_stops_before_training(copy: Config) -> None:
    for folder in folder_of(copy).glob("checkpoint_0*"):
        (folder / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(RunFailed, match="(?s)checkpoint_000020.*checkpoint_000010"):
        train(copy)


def test_diverging_run_fails_with_advice(text_file: Path, tmp_path: Path, wandb: Path) -> None:
    keys = ["optim.lr=1e20", "optim.max_grad_norm=null", "optim.min_lr=0", "track.wandb=books"]
    config = named(text_file, tmp_path, "run", *keys)
    with pytest.raises(RunFailed, match=r"(?s)non-finite.*optim\.lr.*max_grad_norm=1") as told:
        train(config)
    assert "best model" not in str(told.value)  # there was no evaluation
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<b>failed</b> after step" in page and "a lower learning rate" in page
    assert exits(wandb) == {"run": [1]}


def test_fine_tuning_starts_from_a_finished_run(
    finished: tuple[Path, dict[str, object]], text_file: Path, tmp_path: Path
) -> None:
    storage, result = finished
    config = load_config(
        None,
        [
            f"data.source={text_file}",
            f"storage_path={tmp_path}",
            "name=tuned",
            f"model.init_from={storage / 'done'}",
            "train.block_size=32",
            "train.max_steps=2",
            "train.eval_interval=1",
            "optim.lr=1e-5",
            "optim.min_lr=1e-5",
            "train.precision=fp32",
        ],
    )
    tuned = train(config)
    assert tuned["val_loss"] == pytest.approx(result["val_loss"], abs=0.02)
    saved = load_config(str(tmp_path / "tuned" / "config.yaml"), [])
    assert (saved.model.n_layer, saved.model.n_embd) == (2, 32)


def test_ctrl_c_ends_the_call_and_its_workers_and_means_later_what_it_meant_before(
    text_file: Path, tmp_path: Path
) -> None:
    """In a process of the user's own, such as a notebook's, where Ray's handler would stay."""
    config = named(text_file, tmp_path, "stopped", "train.max_steps=1000000")
    handler = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        try:
            before_long((tmp_path / "stopped" / "checkpoint_000010").is_dir)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=interrupt)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    presses.join()
    assert signal.getsignal(signal.SIGINT) is handler
    before_long(lambda: not ray_workers("RayTrainWorker"))
    assert train(named(text_file, tmp_path, "next"))["step"] == 20
    assert signal.getsignal(signal.SIGINT) is handler


def test_init_from_with_another_shape_or_tokenizer_is_refused(
    finished: tuple[Path, dict[str, object]], text_file: Path, tmp_path: Path
) -> None:
    model = f"model.init_from={finished[0] / 'done'}"
    common = [f"data.source={text_file}", f"storage_path={tmp_path}", model, "train.block_size=32"]
    with pytest.raises(UserError, match=r"model\.n_layer=5 but .* has 2"):
        train(load_config(None, [*common, "model.n_layer=5"]))
    with pytest.raises(UserError, match=r"data\.tokenizer=bpe: a new tokenizer's ids"):
        train(load_config(None, [*common, "data.tokenizer=bpe", "data.vocab_size=300"]))


def test_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("just a few words")
    config = named(text, tmp_path, "run")
    with pytest.raises(UserError, match=r"training text is too short.*train\.block_size"):
        train(config)
    assert not (tmp_path / "run").exists()
    # Once the text is prepared the dry run knows it too.
    with pytest.raises(UserError, match=r"training text is too short.*train\.block_size"):
        check(config)


def test_changed_text_is_refused(copy: Config, text_file: Path) -> None:
    (folder_of(copy) / "checkpoint_000020" / "manifest.json").unlink()  # not finished any more
    text_file.write_text(tiny_text(seed=8))
    try:
        with pytest.raises(UserError, match="text or tokenizer .* has changed"):
            train(copy)
    finally:
        text_file.write_text(tiny_text())
