"""The list of runs: what each came to, what comes next, and folders that are none or damaged."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gptray import entry_points
from gptray.config import Config, dump, load_config, override
from gptray.jobs.runs.listing import Listed, listed
from gptray.model.example import save_example
from gptray.storage.driver_lock import held
from gptray.storage.record import Event
from tests.reports.curves import config_of, rows_of, started, write_run
from tests.tuning.sweeps import cut, sweep_config, trained, write_sweep

ROOT = Path(__file__).resolve().parents[2]
OVERFITTED = [4.0, 3.0, 2.5, 2.2, 2.05, 2.0, 2.01, 2.1, 2.2, 2.3, 2.4, 2.5]
FALLING = [6.0, 5.0, 4.2, 3.6, 3.1, 2.7, 2.4, 2.2]
END: Event = {"event": "end", "time": 90.0, "stopped": "max_steps"}


def made(folder: Path, losses: list[float], *events: Event, model: bool = True) -> Path:
    folder.mkdir(parents=True)
    rows = rows_of(losses)
    config = config_of(rows, "train.patience=5")
    write_run(folder, rows, [started(), *events], config)
    write_config(folder, config)
    if model:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    return folder


def by_name(storage: Path) -> dict[str, Listed]:
    return {one.name: one for one in listed(load_config(None, [f"storage_path={storage}"]))}


def test_each_run_has_its_state_verdict_losses_and_next_command(tmp_path: Path) -> None:
    save_example(made(tmp_path / "best", OVERFITTED, END) / "model", "the cat")
    made(tmp_path / "patient", OVERFITTED, {**END, "stopped": "patience"})
    made(tmp_path / "short", FALLING, END)
    made(tmp_path / "cut", FALLING[:4], model=False)
    made(tmp_path / "diverged", FALLING, {**END, "stopped": "non_finite"})
    made(tmp_path / "broken", FALLING[:2], {"event": "failure", "time": 5.0, "message": "disk"})
    made(tmp_path / "unsaved", FALLING, {"event": "failure", "time": 5.0, "message": "disk"})
    # Fewer steps than max_steps: cut off.
    for name in ("cut", "broken"):
        config = config_of(rows_of(FALLING), "train.patience=5")
        write_config(tmp_path / name, config)
    runs = by_name(tmp_path)
    states = {name: (run.state, run.verdict) for name, run in runs.items()}
    assert states == {
        "best": ("finished", "overfits since step 70"),
        "patient": ("stopped early", "overfits since step 70"),
        "short": ("finished", "does not overfit, still falling"),
        "cut": ("interrupted at step 40", "does not overfit, still falling"),
        "diverged": ("failed", "unstable"),
        "broken": ("failed at step 20", "does not overfit, still falling"),
        "unsaved": ("failed at step 80", "does not overfit, still falling"),
    }
    assert (runs["best"].val_loss, runs["best"].step) == (2.0, 120)
    assert runs["best"].parameters == 1_000_000 and runs["best"].bytes > 1000
    words = {name: shlex.split(run.next) for name, run in runs.items()}
    model = f"generate.model={tmp_path / 'best'}"
    assert words["best"] == ["python", "jobs/generate.py", model, "sample.prompt=the cat"]
    assert words["short"][-1] == "train.max_steps=160"
    assert words["cut"][-1] == str(tmp_path / "cut" / "config.yaml")
    load_config(words["cut"][-1], [])
    assert "name=diverged-2" in words["diverged"] and "optim.lr=0.00067" in words["diverged"]
    assert words["unsaved"][-1] == str(tmp_path / "unsaved" / "config.yaml")


def write_config(folder: Path, config: Config) -> None:
    own = {"name": folder.name, "storage_path": str(folder.parent)}
    (folder / "config.yaml").write_text(dump(override(config, own)))


def test_a_run_that_landed_says_so(tmp_path: Path) -> None:
    rows = rows_of([*OVERFITTED, 1.9])
    for row in rows:
        row["phase"] = "landing" if row is rows[-1] else "stable"
    config = config_of(rows, "optim.schedule=wsd")
    folder = write_run(tmp_path / "run", rows, [started(), {**END, "stopped": "patience"}], config)
    write_config(folder, config)
    assert by_name(tmp_path)["run"].verdict == "overfits since step 70, landed from step 60"


def test_a_run_that_a_driver_holds_is_training(tmp_path: Path) -> None:
    run = made(tmp_path / "run", FALLING)
    with held(run):
        one = by_name(tmp_path)["run"]
        assert (one.state, one.next) == ("training", "")
    assert by_name(tmp_path)["run"].state == "finished"


def test_commands_hold_whatever_a_path_or_a_prompt_is(tmp_path: Path) -> None:
    storage = tmp_path / '\ub0b4 \ucc45\'s "texts" $HOME *'
    prompt = 'it\'s "\uc61b\ub0a0" & $5'
    save_example(made(storage / "best", OVERFITTED, END) / "model", prompt)
    made(storage / "short", FALLING, END)
    runs = by_name(storage)
    config = load_config(None, shlex.split(runs["best"].next)[2:])
    assert (config.generate.model, config.sample.prompt) == (str(storage / "best"), prompt)
    _, _, flag, path, longer = shlex.split(runs["short"].next)
    assert flag == "--config" and load_config(path, [longer]).train.max_steps == 160


def test_a_sweep_tells_its_winner(tmp_path: Path) -> None:
    config = sweep_config([{"path": "model.dropout", "uniform": [0, 0.3]}], "tune.num_samples=6")
    trials = cut(config, trained(config, lambda values: (values["model.dropout"], 0.0)))
    best = min((one for one in trials if one.outcome == "finished"), key=lambda one: one.curve[-1])
    folder = write_sweep(tmp_path / "sweep", config, trials)
    for trial in trials:
        write_config(folder / "trials" / trial.name, config)
    assert by_name(tmp_path)["sweep"].state == "interrupted, 6 of 6 trials"
    failed = [replace(one, outcome="failed", curve=[]) for one in trials]
    write_sweep(tmp_path / "failed", config, failed)
    assert by_name(tmp_path)["failed"].state == "failed, 6 of 6 trials"
    write_sweep(tmp_path / "sweep", config, trials, winner=best.name)
    one = by_name(tmp_path)["sweep"]
    assert (one.kind, one.state) == ("sweep", "finished, 6 trials")
    assert one.verdict.startswith(f"winner {best.name} ") and one.val_bpb


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.yaml", b"[[[", "config.yaml"),
        ("config.yaml", b"train: {max_steps: many}\n", "max_steps"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
        ("metrics.jsonl", b'{"step": 1\n', "metrics.jsonl:1: the line is damaged"),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl:1: the line is damaged"),
        ("metrics.jsonl", b'{"val_loss": 3}\n', "step is missing"),
        ("config.yaml", None, "a run without its config.yaml"),
        ("events.jsonl", b"{}\n", "event is missing"),
        ("trials.jsonl", b"{}\n", "event is missing"),
    ],
)
def test_a_damaged_folder_is_one_line_beside_the_others(
    tmp_path: Path, file: str, content: bytes | None, problem: str
) -> None:
    made(tmp_path / "good", OVERFITTED, END)
    made(tmp_path / "bad", OVERFITTED, END)
    (tmp_path / "bad" / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "bad" / file).write_bytes(content)
    runs = by_name(tmp_path)
    assert problem in runs["bad"].problem and "\n" not in runs["bad"].problem
    assert runs["good"].problem == "" and runs["good"].val_loss == 2.0


def test_a_folder_of_another_user_is_one_line_beside_the_others(tmp_path: Path) -> None:
    made(tmp_path / "good", OVERFITTED, END)
    made(tmp_path / "locked", OVERFITTED, END)
    (tmp_path / "locked").chmod(0)
    if os.access(tmp_path / "locked", os.R_OK):
        pytest.skip("this user may read everything")
    runs = by_name(tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert runs["locked"].problem == "cannot be read: Permission denied"
    assert runs["good"].val_loss == 2.0


def test_other_folders_are_named_and_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "data" / "abc").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "itself").symlink_to(tmp_path / "loop")
    runs = by_name(tmp_path)
    assert sorted(runs) == ["letters", "loop"]
    assert runs["letters"].problem == "not a run: it has no config.yaml"


@pytest.mark.parametrize("columns", ["60", "140"])
def test_the_job_prints_a_table_that_folds_and_one_json_line(tmp_path: Path, columns: str) -> None:
    made(tmp_path / "book", OVERFITTED, END)
    made(tmp_path / "a-much-longer-name-that-somebody-chose", FALLING, END)
    (tmp_path / "evil\x1b[2J\nname").mkdir()
    code = (
        "import runpy, sys; sys.argv[1:] = [sys.argv[2]]; sys.argv[0] = 'jobs/runs.py'\n"
        "try: runpy.run_path('jobs/runs.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-", f"storage_path={tmp_path}"],
        env={**os.environ, "COLUMNS": columns}, capture_output=True, text=True, timeout=60,
        cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert {run["name"]: run["verdict"] for run in json.loads(last)["runs"]}["book"] == (
        "overfits since step 70"
    )
    shown = [line for line in lines if "jobs/" not in line]  # commands are to be copied
    assert max(map(len, shown)) <= int(columns)
    assert "\x1b" not in done.stdout
    text = " ".join(" ".join(shown).split())
    assert "2.000" in text and "overfits since step 70" in text and "finished" in text


def test_an_empty_storage_path_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_points.run("runs", [f"storage_path={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"no runs in {tmp_path}", '{"runs": []}']


def test_losses_that_are_not_finite_are_left_out_of_the_json_line(tmp_path: Path) -> None:
    run = made(tmp_path / "run", OVERFITTED, END)
    rows = [{**row, "val_loss": float("nan"), "val_bpb": float("nan")} for row in rows_of([2.0])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made(tmp_path / "other", OVERFITTED, END)
    runs = by_name(tmp_path)
    assert set(runs) == {"run", "other"} and runs["run"].val_loss is None
    json.dumps([asdict(run) for run in runs.values()], allow_nan=False)
