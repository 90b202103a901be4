"""Landing: back to the best checkpoint and down from there; the same bits wherever it is killed."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gptray.config import Config, UserError, load_config, override
from gptray.data.tokens import TokenData
from gptray.storage.record import EVENTS, read_metrics, read_rows
from gptray.training.checkpoint import checkpoint_folder, find_checkpoints
from gptray.training.landing import Landing, landing_gain
from gptray.training.trainer_state import TrainerState
from tests.tiny import tiny_config
from tests.training.runs import Killed, rows, run
from tests.training.test_evaluations import Killed as KilledBeside
from tests.training.test_evaluations import beside, digest, timeless
from tests.two_workers import two_workers

# The learning rate is too high to stay at: validation loss is noise, until the run cools down.
HIGH = (
    "seed=4",
    "optim.schedule=wsd",
    "optim.lr=0.1",
    "optim.min_lr=0.001",
    "optim.decay_fraction=0.5",
    "model.dropout=0.1",
    "train.eval_interval=4",
    "train.max_steps=60",
    "train.patience=2",
    "compute.num_to_keep=1",
)
FILES = ("model/model.safetensors", "optimizer.safetensors")


def high(text_file: Path, tmp_path: Path, *keys: str) -> Config:
    return tiny_config(text_file, tmp_path, *HIGH, *keys)


def last(run_dir: Path) -> Path:
    return find_checkpoints(run_dir)[0]


def landing_of(run_dir: Path) -> Landing:
    landing = TrainerState.load(last(run_dir)).landing
    assert landing
    return landing


def bits(run_dir: Path, *files: str) -> list[str]:
    of_checkpoint = [digest(last(run_dir) / name) for name in (*FILES, *files)]
    return [*of_checkpoint, digest(run_dir / "model" / "model.safetensors")]


def test_the_run_goes_back_to_its_best_checkpoint_and_cools_down(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = high(text_file, tmp_path)
    result = run(config, tiny_data, tmp_path / "r")
    found = rows(tmp_path / "r")
    stable = {row["step"]: row for row in found if row["phase"] == "stable"}
    landed = {row["step"]: row for row in found if row["phase"] == "landing"}
    evaluated = {step: row["val_loss"] for step, row in stable.items() if "val_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    start = max(stable)
    assert result["stopped"] == "patience" and start == best + 2 * 4
    assert landing_of(tmp_path / "r") == Landing(start, best, math.ceil(best / 2), "patience")
    # Steps count on, no step twice; epochs and the learning rate go by the best checkpoint.
    assert [row["step"] for row in found] == list(range(1, result["step"] + 1))
    assert result["step"] == start + math.ceil(best / 2) == max(landed)
    assert landed[start + 1]["epoch"] == stable[best + 1]["epoch"]
    rates = [row["lr"] for row in landed.values()]
    assert rates[0] == 0.1 and rates[-1] < 0.1 * 0.1
    shares = [(lr - 0.001) / 0.099 for lr in rates]
    steps = len(rates)
    assert shares == pytest.approx([1 - math.sqrt(k / steps) for k in range(steps)])
    gain = landing_gain(read_metrics(tmp_path / "r"))
    assert gain == evaluated[best] - min(row["val_loss"] for row in found if "val_loss" in row)
    assert gain and gain > 0
    assert digest(tmp_path / "r" / "model" / "model.safetensors") == bits(tmp_path / "r")[0]
    assert run(config, tiny_data, tmp_path / "r")["step"] == result["step"]  # nothing is left to do
    assert timeless(tmp_path / "r") == [
        {key: value for key, value in row.items() if key != "tokens_per_sec"} for row in found
    ]


def test_a_landing_has_the_bits_of_a_run_whose_stable_part_ended_where_it_went_back_to(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(high(text_file, tmp_path, "train.ema=0.8"), tiny_data, tmp_path / "patient")
    landing = landing_of(tmp_path / "patient")
    assert landing.start > landing.back_to
    whole = landing.back_to + landing.steps
    config = high(text_file, tmp_path, "train.ema=0.8", f"train.max_steps={whole}")
    assert config.stable_steps == landing.back_to
    assert run(config, tiny_data, tmp_path / "short")["stopped"] == "max_steps"
    assert landing_of(tmp_path / "short").start == landing_of(tmp_path / "short").back_to
    averaged = "averaged/model.safetensors"
    assert bits(tmp_path / "short", averaged) == bits(tmp_path / "patient", averaged)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in line", "beside"])
def test_a_run_killed_anywhere_lands_with_the_same_bits(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, way: str
) -> None:
    config = high(text_file, tmp_path, "train.ema=0.8")

    def train(name: str, kill_at: int | None = None) -> Any:
        if way == "in line":
            return run(config, tiny_data, tmp_path / name, kill_at=kill_at)
        kill = f"scoring {kill_at}" if kill_at else ""
        return beside(config, tiny_data, tmp_path / name, kill=kill)

    result = train("whole")
    landing = landing_of(tmp_path / "whole")
    in_landing = landing.start + 4 - landing.start % 4
    assert in_landing < landing.end  # an evaluation before the last one
    for step in (4, landing.back_to, landing.start, in_landing, landing.end):
        with pytest.raises((Killed, KilledBeside)):
            train("killed", kill_at=step)
    again = train("killed")
    assert (again["stopped"], again["step"]) == (result["stopped"], landing.end)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    averaged = "averaged/model.safetensors"
    assert bits(tmp_path / "killed", averaged) == bits(tmp_path / "whole", averaged)
    assert landing_of(tmp_path / "killed") == landing


def test_a_damaged_best_checkpoint_is_passed_over_for_the_best_of_the_others(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = high(text_file, tmp_path, "compute.num_to_keep=9")
    run(config, tiny_data, tmp_path / "whole")
    best, start = landing_of(tmp_path / "whole").back_to, landing_of(tmp_path / "whole").start
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "hurt", kill_at=start)
    weights = checkpoint_folder(tmp_path / "hurt", best) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run(config, tiny_data, tmp_path / "hurt")
    losses = {row["step"]: row.get("val_loss", math.inf) for row in rows(tmp_path / "hurt")}
    others = [step for step in losses if step <= start and step != best]
    assert landing_of(tmp_path / "hurt").back_to == min(others, key=lambda step: losses[step])
    told = [one["message"] for one in read_rows(tmp_path / "hurt" / EVENTS) if "message" in one]
    assert any(f"checkpoint_{best:06d} is damaged" in message for message in told)
    # A second start in the landing's own part goes on from the same checkpoint.
    again = run(config, tiny_data, tmp_path / "hurt")
    assert again["step"] == landing_of(tmp_path / "hurt").end


def test_the_stable_part_leaves_steps_for_the_cool_down() -> None:
    for most in range(2, 300):
        for fraction in (0.1, 0.2, 1.0):
            words = [f"train.max_steps={most}", f"optim.decay_fraction={fraction}"]
            config = load_config(None, [*words, "optim.schedule=wsd"])
            stable = config.stable_steps
            assert stable >= 1 and stable + config.optim.cooldown_steps(stable) <= most
            more = stable + 1
            assert more + config.optim.cooldown_steps(more) > most
    assert load_config(None, ["train.max_steps=7"]).stable_steps == 7
    with pytest.raises(UserError, match=r"optim.schedule=wsd needs train.max_steps=2"):
        load_config(None, ["optim.schedule=wsd", "train.max_steps=1"])


def _worker(rank: int, config: Config, data_dir: Path, run_dir: Path) -> None:
    data = TokenData.open(data_dir)
    start = landing_of(run_dir.parent / "one").start
    for kill_at in (start, None):
        with suppress(Killed):
            run(config, data, run_dir / "killed", kill_at=kill_at)
    run(config, data, run_dir / "whole")
    sharded = override(config, {"compute.strategy": "fsdp", "train.ema": None})
    run(sharded, data, run_dir / "sharded")

    def fetch(checkpoint: Path) -> None:
        if rank == 1:
            shutil.copytree(run_dir / "apart 0" / checkpoint.name, checkpoint)

    run(config, data, run_dir / f"apart {rank}", fetch=fetch)


@pytest.mark.slow
def test_several_workers_land_as_one_does_sharded_or_not(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    # Rounding stays small: at a low learning rate, and a stable part that ends where it must.
    keys = ("optim.lr=0.003", "train.max_steps=12", "model.dropout=0", "train.ema=0.5")
    one = high(text_file, tmp_path, *keys)
    run(one, tiny_data, tmp_path / "one")
    plain = override(one, {"train.ema": None})
    run(plain, tiny_data, tmp_path / "plain")
    two_workers(
        _worker, override(one, {"compute.num_workers": 2}), tiny_data.data_dir, tmp_path / "two"
    )
    for name, like in (("whole", "one"), ("killed", "one"), ("sharded", "plain")):
        ours, theirs = rows(tmp_path / "two" / name), rows(tmp_path / like)
        assert [row["phase"] for row in ours] == ["stable"] * 8 + ["landing"] * 4
        for key in ("train_loss", "lr", "epoch"):
            assert [row[key] for row in ours] == pytest.approx(
                [row[key] for row in theirs], abs=1e-4
            )
        assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], abs=1e-4)
    averaged = "averaged/model.safetensors"
    whole = bits(tmp_path / "two" / "whole", averaged)
    assert bits(tmp_path / "two" / "killed", averaged) == whole
    # On nodes that share no disk, the second worker fetches what it lands from.
    assert bits(tmp_path / "two" / "apart 0", averaged) == whole
