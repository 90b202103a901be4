"""A disk that is full: one sentence, nothing lost, and the same bits once there is room."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import Config, RunFailed, UserError, override
from gptray.data.tokens import TokenData
from gptray.storage.files import sha256_of
from gptray.storage.record import EVENTS, METRICS, read_rows, write_event
from gptray.training.checkpoint import damage, find_checkpoints
from gptray.training.journal import Journal
from gptray.training.loop import fit
from tests.full_disk import files_up_to, limit_files
from tests.tiny import tiny_config
from tests.two_workers import two_workers

CPU = torch.device("cpu")
LAST = "checkpoint_000020"


@pytest.fixture(autouse=True)
def room_again() -> Iterator[None]:
    yield
    limit_files(-1)


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> Config:
    return tiny_config(text_file, tmp_path)


def run(
    config: Config, data: TokenData, run_dir: Path, *, after: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Train; `after(step)` is called once an evaluation is over."""

    def report(metrics: dict[str, Any], _: Path | None) -> None:
        if after:
            after(metrics["step"])

    return fit(config, data, run_dir, report=report, sample=lambda model: [], device=CPU)


def fill_at(step: int, size: int) -> Callable[[int], None]:
    return lambda now: limit_files(size) if now == step else None


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All of a run that must not depend on what happened to it."""
    names = [f"{LAST}/model/model.safetensors", f"{LAST}/optimizer.safetensors"]
    names.append("model/model.safetensors")
    rows = [
        {key: value for key, value in row.items() if key != "tokens_per_sec"}
        for row in read_rows(run_dir / METRICS)
    ]
    return rows, [sha256_of(run_dir / name) for name in names]


def test_checkpoint_without_room_ends_the_run_and_the_next_start_resumes(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path / "calm")
    full = tmp_path / "full"
    result = run(config, tiny_data, full, after=fill_at(10, 20_000))
    limit_files(-1)
    assert (result["stopped"], result["mistake"]) == ("failed", False)
    assert result["message"].startswith(f"cannot write {full / LAST}: File too large (")
    assert [folder.name for folder in find_checkpoints(full)] == ["checkpoint_000010"]
    assert damage(full / "checkpoint_000010") is None and not list(full.glob(".checkpoint*"))
    assert run(config, tiny_data, full)["stopped"] == "max_steps"
    assert outcome(full) == outcome(tmp_path / "calm")


def test_rows_without_room_end_the_run_at_the_evaluation_and_are_written_again(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path / "calm")
    full = tmp_path / "full"

    def fill(step: int) -> None:
        if step == 10:
            limit_files((full / METRICS).stat().st_size + 150)

    result = run(config, tiny_data, full, after=fill)
    limit_files(-1)
    assert result["message"].startswith(f"cannot write {full / METRICS}: File too large (")
    text = (full / METRICS).read_text("utf-8")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert text.endswith("\n") and steps == list(range(1, len(steps) + 1)) and 10 <= len(steps) < 20
    run(config, tiny_data, full)
    assert outcome(full) == outcome(tmp_path / "calm")


def test_rows_wait_for_room(tmp_path: Path) -> None:
    with Journal(tmp_path, step=0) as journal:
        journal.write({"step": 1, "train_loss": 2.0})
        with files_up_to((tmp_path / METRICS).stat().st_size + 5):
            journal.write({"step": 2, "train_loss": 1.5})
            assert (tmp_path / METRICS).read_bytes().count(b"\n") == 1
            with pytest.raises(RunFailed, match="cannot write .*metrics.jsonl"):
                journal.sync()
        journal.write({"step": 3, "train_loss": 1.0})
        assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2, 3]
        journal.sync()


def test_model_that_cannot_be_published_is_published_by_the_next_start(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path / "calm")
    full = tmp_path / "full"
    in_the_way = full / "model" / ".model.safetensors.tmp"
    before = ""

    def obstruct(step: int) -> None:
        nonlocal before
        if step == 10:
            before = sha256_of(full / "model" / "model.safetensors")
            in_the_way.mkdir()

    result = run(config, tiny_data, full, after=obstruct)
    assert result["message"].startswith(f"cannot write {full / 'model'}: ")
    assert sha256_of(full / "model" / "model.safetensors") == before
    in_the_way.rmdir()
    run(config, tiny_data, full)
    assert outcome(full) == outcome(tmp_path / "calm")


def test_event_without_room_leaves_no_torn_line(tmp_path: Path) -> None:
    write_event(tmp_path, "start", step=0)
    with (
        files_up_to((tmp_path / EVENTS).stat().st_size + 10),
        pytest.raises(RunFailed, match="cannot write .*events.jsonl"),
    ):
        write_event(tmp_path, "notice", message="too long for what is left")
    write_event(tmp_path, "end", stopped="max_steps")
    assert [event["event"] for event in read_rows(tmp_path / EVENTS)] == ["start", "end"]


def test_users_mistake_in_a_worker_is_returned_as_one(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    def sample(model: object) -> list[tuple[str, str]]:
        raise UserError("sample.prompt: the tokenizer does not know it")

    result = fit(config, tiny_data, tmp_path, report=lambda *_: None, sample=sample, device=CPU)
    assert (result["stopped"], result["mistake"]) == ("failed", True)
    assert result["message"] == "sample.prompt: the tokenizer does not know it"


def _worker(rank: int, config: Config, data_dir: Path, run_dir: Path) -> None:
    after = fill_at(10, 20_000) if rank == 0 else None
    result = run(config, TokenData.open(data_dir), run_dir, after=after)
    limit_files(-1)
    (run_dir / f"rank-{rank}.json").write_text(json.dumps(result), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_workers_leave_together_when_the_first_cannot_write(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, strategy: str
) -> None:
    words = ("compute.num_workers=2", f"compute.strategy={strategy}")
    config = tiny_config(text_file, tmp_path, *words)
    two_workers(_worker, config, tiny_data.data_dir, tmp_path)
    first, second = (
        json.loads((tmp_path / f"rank-{rank}.json").read_text("utf-8")) for rank in (0, 1)
    )
    assert first == second
    assert first["message"].startswith(f"cannot write {tmp_path / LAST}: File too large")


def test_removed_checkpoints_do_not_start_the_run_over_its_model(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path)
    before = sha256_of(tmp_path / "model" / "model.safetensors")
    for folder in find_checkpoints(tmp_path):
        folder.rename(tmp_path / f"away-{folder.name}")
    result = run(config, tiny_data, tmp_path)
    assert (result["stopped"], result["mistake"]) == ("failed", True)
    assert "train.resume=never" in result["message"]
    assert f"model.init_from={tmp_path / 'model'}" in result["message"]
    assert sha256_of(tmp_path / "model" / "model.safetensors") == before
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, 21))


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_run_that_is_trained_longer_equals_one_that_was_that_long_from_the_start(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, schedule: str
) -> None:
    keys = (f"optim.schedule={schedule}", "optim.step_size=7", "model.dropout=0.1")
    longer = tiny_config(text_file, tmp_path, *keys)
    shorter = override(longer, {"train.max_steps": 10})
    run(longer, tiny_data, tmp_path / "at once")
    assert run(shorter, tiny_data, tmp_path / "raised")["step"] == 10
    assert run(longer, tiny_data, tmp_path / "raised")["step"] == 20
    assert outcome(tmp_path / "raised") == outcome(tmp_path / "at once")


def test_run_that_is_trained_longer_ends_its_schedule_at_the_new_last_step(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(override(config, {"train.max_steps": 10}), tiny_data, tmp_path)
    assert run(config, tiny_data, tmp_path)["stopped"] == "max_steps"
    rates = [row["lr"] for row in read_rows(tmp_path / METRICS)]
    assert len(rates) == 20 and rates[10] > rates[9] and rates[19] < rates[10]


def test_run_that_patience_ended_goes_on_with_more_of_it(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    keys = ("train.min_delta=100", "train.eval_interval=2", "train.max_steps=100")
    config = tiny_config(text_file, tmp_path, *keys, "train.patience=2")
    assert run(config, tiny_data, tmp_path)["step"] == 6
    result = run(override(config, {"train.patience": 4}), tiny_data, tmp_path)
    assert (result["stopped"], result["step"]) == ("patience", 10)
