"""A sweep's report.html as a browser gets it, at every state of the sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gptray.config import UserError
from gptray.reports.sweep.report import write_sweep_report
from gptray.tuning.sweep_record import TRIALS
from tests.reports.pages import Page
from tests.tuning.sweeps import Made, Values, cut, sweep_config, trained, write_sweep

SPACE: list[dict[str, Any]] = [
    {"path": "model.residual", "choice": [True, False]},
    {"path": "model.dropout", "uniform": [0.0, 0.3]},
    {"path": "optim.weight_decay", "loguniform": [0.01, 1.0]},
    {"paths": ["model.n_embd", "model.n_inner"], "choice": [[128, 512], [256, 1024]]},
]
EVIL = "</li><script>alert('1')</script><img src=x onerror=alert(2)> &amp; \x00"


def worth(values: Values) -> tuple[float, float]:
    """Residuals are worth 0.3, a dropout of 0.3 as much, and a gap of 0.3."""
    return 0.3 * (not values["model.residual"]) - values["model.dropout"], -values["model.dropout"]


def sweep(trials: int = 16, *changes: str) -> tuple[Any, list[Made]]:
    config = sweep_config(SPACE, f"tune.num_samples={trials}", *changes)
    return config, trained(config, worth)


def finished(folder: Path, *changes: str, trials: int = 16) -> Path:
    """A sweep that is over, its baseline first: 2.5 bits per byte; 0005 is the best."""
    config, made = sweep(trials, *changes)
    baseline = Made("0099", {}, [(3.0 - 0.04 * step, 0.1) for step in range(12)])
    best = min(made, key=lambda trial: trial.curve[-1]).name
    return write_sweep(folder, config, [baseline, *cut(config, made)], winner=best)


def page_of(folder: Path) -> Page:
    """The page without its PNG files, which take a second."""
    return Page(write_sweep_report(folder, running=True))


def best_of(folder: Path) -> str:
    winner = re.search(r'"winner", "trial": "(\d+)"', (folder / TRIALS).read_text())
    assert winner
    return winner[1]


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep of forty trials and the baseline."""
    return write_sweep_report(finished(tmp_path_factory.mktemp("forty"), trials=40))


def test_the_headline_says_who_won_by_what_and_at_what_cost(forty: Path) -> None:
    page, best = Page(forty), best_of(forty.parent)
    assert forty.name == "report.html"
    head = re.search(
        rf"Trial {best} generalises best: (1\.\d+) validation bits per byte, against 2\.560 of "
        r"the config as it is\. Its model has seen all of the training text, in 1[0-2]0 steps "
        r"\(2\d\d,\d00 tokens\)\. What helped it: model\.dropout=0\.2\d*\. "
        r"The sweep took (\d+)% of the steps that all trials would take in full: "
        r"([\d,]+) of 4,920\.",
        page.text,
    )
    assert head, page.text[:600]
    score, share, run = float(head[1]), int(head[2]), int(head[3].replace(",", ""))
    assert 1.6 < score < 1.85 and 25 < share < 60 and share == round(100 * run / 4920)
    assert f"finished after {41} trials" in page.text
    assert f"run: {run:,} ({share}%)" in page.text
    saved = 4920 - run
    assert f"saved by stopping at rungs: {saved:,} ({100 - share}%)" in page.text


def test_the_report_says_what_each_setting_was_worth_and_how_that_is_known(forty: Path) -> None:
    page = Page(forty)
    assert re.search(r"Lowered validation loss: model\.dropout 0\.\d+ to 0\.29 instead", page.text)
    assert "Raised validation loss: model.residual false instead of true (+0." in page.text
    # Dropout raises the losses of training, which narrows the gap by itself.
    assert "Narrowed the gap" not in page.text
    assert "The gap says nothing about model.dropout: such noise raises training loss." in page.text
    told = page.text.split("No clear effect")[0]
    assert "weight_decay 0" not in told.split("What each setting was worth")[1]
    assert "group horseshoe prior" in page.text and "Limits: parts add up" in page.text
    assert re.search(r"Trials compared: 41 at step 20, \d+ at step 60", page.text)
    for name in ("effects.png", "trials.png"):
        assert (forty.parent / name).read_bytes()[:4] == b"\x89PNG"


def test_trials_stand_in_order_with_their_settings_the_winner_marked(tmp_path: Path) -> None:
    folder = finished(tmp_path / "sweep")
    page = page_of(folder)
    ranks = re.findall(r"(\d+)\.\xa0(\d{4})", page.html)
    assert [int(rank) for rank, _ in ranks] == list(range(1, 18))
    assert ranks[0][1] == best_of(folder) and len({name for _, name in ranks}) == 17
    scores = [float(score) for score in re.findall(r"(\d\.\d{4})</td><td", page.html)]
    assert scores[:17] == sorted(scores[:17])
    (marked,) = [row for row in page.all("tr") if "best" in str(row.get("class"))]
    assert "the winner, finished; model.residual=true, model.dropout=0.2" in page.text
    assert "the config as it is, finished; model.residual=true, model.dropout=0," in page.text
    assert "model.n_embd=128 and model.n_inner=512" in page.text


def test_curves_of_all_trials_are_drawn_with_the_rungs(tmp_path: Path) -> None:
    page = page_of(finished(tmp_path / "sweep"))
    curves = [str(path["class"]) for path in page.all("path") if "curve" in str(path.get("class"))]
    assert len(curves) == 2 * 17 and curves.count("curve winner") == curves.count("curve own") == 2
    assert sum(path.get("class") == "rung" for path in page.all("path")) == 4
    dots = [dot for dot in page.all("circle") if "hollow" in str(dot["class"]).split()]
    assert dots  # trials that were stopped, in the small pictures
    assert sum("stopped at a rung;" in word for word in page.words) == curves.count("curve cut") / 2


def test_trials_gone_wrong_are_told_with_their_words_and_nothing_is_run(tmp_path: Path) -> None:
    config, made = sweep()
    made[3].outcome, made[3].message, made[3].curve = "failed", EVIL, []
    made[4].outcome, made[4].message = "diverged", "step 120: loss nan, lr 0.5"
    made[4].curve = [(0.5, 0.0)] * 3
    folder = write_sweep(tmp_path / "sweep", config, made, winner="0000")
    page = page_of(folder)
    assert page.all("script") == [] and page.all("img") == []
    assert "0003 failed at step 0: </li><script>alert('1')</script>" in page.text
    assert "0004 diverged at step 30: step 120: loss nan, lr 0.5" in page.text
    assert "\x00" not in page.html and "1.\xa00004" not in page.html
    assert "not run because trials went wrong: 210 (11%)" in page.text
    policy = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy[0]["content"])
    attributes = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href"} & attributes and "http://" not in page.html


def test_a_page_renews_itself_and_says_how_far_the_sweep_is_while_it_runs(tmp_path: Path) -> None:
    config, made = sweep()
    for trial in made[9:]:
        trial.outcome, trial.started, trial.curve = None, False, []
    made[9].started = made[10].started = True
    made[9].curve = [(2.5, 0.1)]
    folder = write_sweep(tmp_path / "sweep", config, made)
    page = Page(write_sweep_report(folder, running=True))
    assert "running : 9 of 16 trials ended, 2 running" in page.text
    assert [m for m in page.all("meta") if m.get("http-equiv") == "refresh"]
    assert re.search(r"Trial \d{4} is ahead: .* So far it took 1,090 steps\.", page.text)
    assert "still to be run: 830" in page.text and "waits; model" in page.text
    assert not list(folder.glob("*.png"))
    page = Page(write_sweep_report(folder))
    assert "interrupted : 9 of 16 trials ended; the same command resumes it" in page.text
    assert not [m for m in page.all("meta") if m.get("http-equiv") == "refresh"]


@pytest.mark.parametrize("trials", [0, 2])
def test_a_sweep_without_an_evaluation_has_a_report(tmp_path: Path, trials: int) -> None:
    config, made = sweep(4)
    for number, trial in enumerate(made):
        trial.outcome, trial.started, trial.curve = None, number < trials, []
    folder = write_sweep(tmp_path / "sweep", config, made[: trials * 2])
    page = page_of(folder)
    assert "No trial has been evaluated yet." in page.text
    assert "Not enough trials: 0 trials got to step 20" in page.text
    page_of(folder)


def test_few_trials_are_said_to_be_too_few(tmp_path: Path) -> None:
    config, made = sweep(6)
    page = Page(write_sweep_report(write_sweep(tmp_path / "sweep", config, made)))
    assert "Not enough trials: 6 trials got to step 20" in page.text and "it takes 8." in page.text
    assert "Lowered" not in page.text and not (tmp_path / "sweep" / "effects.png").exists()


def test_a_half_written_record_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = finished(tmp_path / "sweep")
    record = folder / TRIALS
    record.write_bytes(record.read_bytes()[:-30])  # in the middle of the last line
    metrics = next((folder / "trials").glob("*/metrics.jsonl"))
    metrics.write_text(metrics.read_text()[:-20])
    assert "the same command resumes it" in Page(write_sweep_report(folder)).text


def test_a_sweep_in_which_all_went_wrong_gives_the_reasons(tmp_path: Path) -> None:
    config, made = sweep(3)
    for trial in made:
        trial.outcome, trial.curve, trial.message = "failed", [], "no room on the disk"
    page = Page(write_sweep_report(write_sweep(tmp_path / "sweep", config, made)))
    assert "failed : none of 3 trials produced a model" in page.text
    assert page.text.count("failed at step 0: no room on the disk") == 3


def test_the_config_as_it_is_can_win_and_a_stopped_one_is_said_to_be_stopped(
    tmp_path: Path,
) -> None:
    config, made = sweep(4)
    own = Made("0099", {}, [(1.0, 0.1)] * 12)
    page = page_of(write_sweep(tmp_path / "a", config, [own, *made]))
    assert "The config as it is (trial 0099) is ahead: 1.000" in page.text
    own = Made("0099", {}, [(3.5, 0.1)] * 2, "stopped")
    page = page_of(write_sweep(tmp_path / "b", config, [own, *made]))
    assert "against 3.500 of the config as it is when it was stopped at step 20." in page.text
    assert "lower than the config as it is when it was stopped at step 20" in page.text


def test_what_helped_others_did_not_help_the_winner(tmp_path: Path) -> None:
    config, made = sweep(24)
    chosen = next(trial for trial in made if trial.values["model.dropout"] < 0.09)
    chosen.curve = [(1.2, 0.1)] * 12
    folder = write_sweep(tmp_path / "sweep", config, made, winner=chosen.name)
    page = page_of(folder)
    assert "Lowered validation loss: model.dropout" in page.text
    assert "What helped it" not in page.text and "Its settings: " in page.text


def test_repetitions_have_their_mean_and_spread(tmp_path: Path) -> None:
    config, made = sweep(4)
    for trial in made:
        trial.curve = [(2.5, 0.1)] * 12
    made[1].curve[-1] = (2.0, 0.1)
    repeated = [
        Made(f"000{number}", {**made[1].values, "seed": number}, [(score, 0.1)] * 12,
             replicate_of="0001")
        for number, score in ((4, 2.1), (5, 2.2))
    ]  # fmt: skip
    folder = write_sweep(tmp_path / "sweep", config, [*made, *repeated], winner="0001")
    page = page_of(folder)
    assert "2.100 validation bits per byte on average over 3 seeds" in page.text
    assert "bits per byte: 2.0000, 2.1000, 2.2000" in page.text and "0.1000" in page.text
    assert "\xa00004" not in page.html
    # One that still runs tells nothing yet.
    repeated[1].outcome, repeated[1].curve = None, [(9.0, 0.1)]
    page = page_of(write_sweep(tmp_path / "running", config, [*made, *repeated]))
    assert "2.050 validation bits per byte on average over 2 seeds" in page.text
    assert "2.0000, 2.1000" in page.text and "2.1000, 9" not in page.text


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no sweep"):
        write_sweep_report(tmp_path)


def test_a_sweep_of_unlike_trials_has_a_report(tmp_path: Path) -> None:
    """Settings with one level, of odd kinds, and trials of different length."""
    space: list[dict[str, Any]] = [
        {"path": "optim.betas", "choice": [[0.9, 0.99], [0.9, 0.95]]},
        {"path": "data.split", "choice": ["90:10"]},
        {"path": "train.max_steps", "choice": [60, 120]},
        {"path": "optim.max_grad_norm", "choice": [None, 1.0]},
        {"path": "model.dropout", "uniform": [0.1, 0.3]},
    ]
    config = sweep_config(space, "tune.num_samples=12")
    made = trained(config, lambda values: (0.0, 0.0))
    for trial in made:
        del trial.curve[trial.values["train.max_steps"] // 10 :]
    with_own = [*made, Made("0099", {}, made[0].curve)]
    page = page_of(write_sweep(tmp_path / "sweep", config, with_own))
    assert "optim.betas=0.9:0.95" in page.text and "optim.max_grad_norm=null" in page.text


def test_a_trial_ahead_whose_tokenizer_loses_text_is_told(tmp_path: Path) -> None:
    config, made = sweep(4)
    ahead, behind = made[0], made[1]
    ahead.curve, ahead.lost = [(1.0, 0.1)] * 12, 0.0212
    behind.curve, behind.lost = [(9.0, 0.1)] * 12, 0.5
    page = page_of(write_sweep(tmp_path, config, made, winner=ahead.name))
    assert (
        f"Trial {ahead.name}'s tokenizer loses 2.1% of the text. "
        "In scores, each lost byte counts 8 bits."
    ) in page.text
    assert "its tokenizer loses 50.0% of the text" in page.text  # in the ranking alone
    assert f"rial {behind.name}'s tokenizer" not in page.text


def test_a_sweep_that_loses_nothing_says_nothing_of_it(forty: Path) -> None:
    assert "loses" not in Page(forty).text
