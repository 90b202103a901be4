"""Starting Ray Train again for as long as its workers leave, and what a dry run says of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.jobs.train.attempts import fit_until_done
from gptray.jobs.train.check import check, plan
from gptray.jobs.tune.check import check as check_sweep
from tests.tiny import tiny_config


def test_workers_that_leave_start_again_until_the_run_ends() -> None:
    results: list[dict[str, object]] = [
        {"stopped": "left"},
        {"stopped": "left"},
        {"stopped": "patience", "step": 9},
    ]
    given = []

    def fit(workers: int) -> dict[str, object]:
        given.append(workers)
        return results.pop(0)

    config = load_config(None, ["compute.num_workers=2"])
    assert fit_until_done(config, {"CPU": 1.0}, fit) == {"stopped": "patience", "step": 9}
    assert given == [2, 2, 2]


def test_a_dry_run_says_how_an_elastic_run_shares_its_work(text_file: Path, tmp_path: Path) -> None:
    words = ["compute.num_workers=[1, 3]", "train.micro_batch_size=2", "name=r"]
    rows = dict(plan(check(tiny_config(text_file, tmp_path, *words))))
    assert rows["workers"] == "1 to 3, depending on room (CPU)"
    assert rows["micro-batch"] == "2 x 4 passes, shared among the workers"


def test_trials_of_a_sweep_have_a_fixed_number_of_workers(text_file: Path, tmp_path: Path) -> None:
    words = ["compute.num_workers=[1, 2]", "tune.space=[{path: optim.lr, choice: [1e-3, 2e-3]}]"]
    with pytest.raises(
        UserError, match=r"num_workers=\[1, 2\]: the trials of a sweep have a fixed"
    ):
        check_sweep(tiny_config(text_file, tmp_path, *words))
