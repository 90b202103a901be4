"""Training on nodes that are taken: announced, it moves without doing a step twice."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import pytest

from gptray.config import load_config
from gptray.data.tokens import TokenData
from gptray.jobs.prepare.check import check_text
from gptray.storage.record import read_events, read_metrics
from tests.jobs.nodes import LIMIT_S, cluster_of, job, line_with
from tests.processes import before_long, ray_workers
from tests.training.runs import run

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]
STEPS = 120

# In thousands of steps of which some learn much, rounding of 1e-7 grows to 5e-3.
SLOWLY = "optim.lr=1e-5"


def words(source: Path, storage: Path, *others: str) -> list[str]:
    """The command line of a run that takes its time."""
    usual = [
        f"data.source={source}",
        f"storage_path={storage}",
        "name=run",
        "data.tokenizer=char",
        "model.n_layer=2",
        "model.n_embd=128",
        "model.n_positions=64",
        "train.block_size=64",
        "train.global_batch_size=24",
        "train.micro_batch_size=4",
        "train.precision=fp32",
        "optim.lr=1e-4",  # a higher one makes more of the rounding in sums of 2 workers
        "optim.min_lr=0",
        f"train.max_steps={STEPS}",
        "train.eval_interval=100",
        "train.log_interval=1",
        "sample.max_new_tokens=4",
        "compute.max_failures=0",
    ]
    return list({word.split("=")[0]: word for word in [*usual, *others]}.values())


def losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train_loss"] for row in rows]


def undisturbed(words: list[str], folder: Path) -> list[float]:
    """The losses of one worker, in this process, from the text that a job has prepared."""
    config = load_config(None, words)
    data = check_text(config).data
    assert data
    run(config, data, folder)
    return losses(folder)


def starts(run_dir: Path) -> list[tuple[int, int]]:
    """The steps after which the run started, and with how many workers."""
    events = [event for event in read_events(run_dir) if event["event"] == "start"]
    return [(event["step"], event["workers"]) for event in events]


def saved(run_dir: Path) -> list[int]:
    """The steps at which the workers saved and left."""
    told = [event["message"] for event in read_events(run_dir) if event["event"] == "notice"]
    found = [re.match(r"saved at step ([\d,]+), to resume", text) for text in told]
    return [int(one[1].replace(",", "")) for one in found if one]


def test_a_node_that_is_about_to_be_taken_and_a_sigterm_cost_no_step_and_no_failure(
    text_file: Path,
    tiny_data: TokenData,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)  # the session's Ray's
    run_dir, asked = data_root / "moving", words(text_file, data_root, "name=moving")
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as (nodes, (_, second)):
        with job("train", *asked, "compute.num_workers=2") as process:
            line_with("step   5/", process)
            assert len(ray_workers("Cleaner")) == 1 and not ray_workers("PlacementGroupCleaner")
            nodes.add(1)
            nodes.drain(second, 600)
            line_with("to resume with 2 workers: node", process)
            line_with("resuming after step", process)
            line_with(f"/{STEPS}", process)  # all workers are there, and those before have gone
            os.kill(min(ray_workers("RayTrainWorker")), signal.SIGTERM)
            line_with("a worker got SIGTERM", process)
            out, told = process.communicate(timeout=2 * LIMIT_S)
        assert process.returncode == 0, told
        # It outlives its controller, but not the run.
        before_long(lambda: not ray_workers("Cleaner"))
    first, second, third = starts(run_dir)
    assert [first[1], second[1], third[1]] == [2, 2, 2]
    assert saved(run_dir) == [second[0], third[0]], "steps were done twice"
    assert losses(run_dir) == pytest.approx(undisturbed(asked, tmp_path / "whole"), abs=1e-5)


@pytest.mark.chaos
def test_an_elastic_training_goes_on_with_the_workers_that_there_is_room_for(
    text_file: Path, tmp_path: Path
) -> None:
    keys = ("train.max_steps=3000", "train.eval_interval=50", "compute.max_failures=1")
    asked = words(text_file, tmp_path, *keys, SLOWLY)
    with cluster_of({"num_cpus": 1}) as (nodes, _):
        elastic = [*asked, "compute.num_workers=[1, 3]"]
        with job("train", *elastic) as process:
            line_with(" 5/3000", process)
            second, third = nodes.add(1), nodes.add(1)
            line_with(", 3 workers,", process)
            nodes.drain(second, 20)
            line_with("will be preempted in", process)
            line_with(", 2 workers,", process)
            line_with("val", process)
            nodes.kill(third)
            line_with("failed", process)
            process.terminate()  # between two numbers of workers
            _, told = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 130, told
        with job("train", *elastic) as process:
            _, told = process.communicate(timeout=2 * LIMIT_S)
        assert process.returncode == 0, told
    begun = starts(tmp_path / "run")
    numbers = [workers for _, workers in begun]
    # With 2 between, where the third node took its time.
    assert numbers[0] == 1 and numbers[-3:] == [3, 2, 1]
    assert saved(tmp_path / "run") == [step for step, _ in begun[1:-1]], "steps were done twice"
    assert losses(tmp_path / "run") == pytest.approx(
        undisturbed(asked, tmp_path / "whole"), abs=1e-5
    )


def reading(process: Popen[str]) -> list[str]:
    """Read what a job tells on stderr until its end, in a thread; the lines so far."""
    told: list[str] = []
    assert process.stderr
    threading.Thread(target=told.extend, args=(process.stderr,), daemon=True).start()
    return told


def wait_for_workers(
    run_dir: Path, number: int, *, before: int, process: Popen[str], told: list[str]
) -> None:
    """Return when the run has started more often than before, with so many workers."""
    deadline = time.monotonic() + LIMIT_S
    while len(starts(run_dir)) <= before or starts(run_dir)[-1][1] != number:
        with suppress(TimeoutExpired):
            process.wait(0.5)
        assert process.poll() is None, "".join(["the run ended before all changes:\n", *told])
        assert time.monotonic() < deadline, "".join([f"no start with {number} workers:\n", *told])


@pytest.mark.chaos
def test_nodes_come_and_go_ten_times_and_the_losses_are_those_of_a_fixed_run(
    text_file: Path, tmp_path: Path
) -> None:
    keys = ("train.max_steps=6000", "train.eval_interval=50", "compute.max_failures=10")
    asked = words(text_file, tmp_path, *keys, SLOWLY)
    run_dir, rng, others = tmp_path / "run", random.Random(1), list[Any]()
    elastic = "compute.num_workers=[1, 3]"
    with cluster_of({"num_cpus": 1}) as (nodes, _), job("train", *asked, elastic) as process:
        told = reading(process)
        wait_for_workers(run_dir, 1, before=0, process=process, told=told)
        killed_at: dict[int, int] = {}  # the number of the start after a kill: the step before it
        for change in range(10):
            before = len(starts(run_dir))
            if not others or (len(others) < 2 and rng.random() < 0.5):
                others.append(nodes.add(1))
            elif change % 2:
                nodes.drain(others.pop(rng.randrange(len(others))), 20)
            else:
                killed_at[before] = read_metrics(run_dir)[-1]["step"]
                nodes.kill(others.pop(rng.randrange(len(others))))
            workers = 1 + len(others)
            wait_for_workers(run_dir, workers, before=before, process=process, told=told)
        assert process.wait(timeout=3000) == 0, "".join(told)
    kept = iter(saved(run_dir))
    for number, (step, _) in enumerate(starts(run_dir)[1:], start=1):
        if number in killed_at:
            assert killed_at[number] - step <= 50 + 1
        else:
            assert step == next(kept), "steps were done twice"
    fixed = undisturbed(asked, tmp_path / "whole")
    assert losses(run_dir) == pytest.approx(fixed, abs=1e-5)
