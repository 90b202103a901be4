"""What rungs save and what they cost: sweeps against the same trials, all run to their end.

  python benchmarks/tune.py
  python benchmarks/tune.py --config configs/overfitting_sweep.yaml --seeds 1 2 3 --folder runs/tune

For each seed it runs configs/overfitting_demo.yaml, or another config, as it is, then once more
with no rungs and without early stopping inside the trials, so that each makes all its steps. Prints
both rankings and, last, one JSON line. There `behind` is how far the winner is above the best of
all, as a share of its loss; `rank_correlation` is Spearman's, over all trials, of the loss at the
first rung and the lowest of all steps; `overhead_s` the time that a trial takes beyond its own
training loop (from the end of one to the first step of the next in the same process).

Further arguments are keys of the config, such as train.max_steps=300, for all sweeps. What FOLDER
has of them is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptray.config import load_config
from gptray.record import EVENTS, MetricsRow, read_rows
from gptray.tuning.sweep_record import Trial, load_trials, rungs, trial_dir
from gptray.tuning.trial_plan import ranked, score

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "overfitting_demo.yaml"


def sweep(
    storage: Path, config: Path, name: str, keys: list[str]
) -> tuple[list[Trial], dict[str, Any], float]:
    """Run a sweep; return its trials, its JSON line and its seconds."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), f"--config={config}"]
    command += [f"storage_path={storage}", f"name={name}", *keys]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the sweep {name} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return load_trials(storage / name), result, time.monotonic() - began


def to_the_end(space: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The space in which no trial stops early by itself."""
    return [
        {**entry, "choice": [None for _ in entry["choice"]]}
        if entry.get("path") == "train.patience"
        else entry
        for entry in space
    ]


def overheads(storage: Path, name: str, trials: list[Trial]) -> list[float]:
    """Seconds from the end of a trial's loop to the beginning of the next one's, by process."""
    spans: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        events = read_rows(trial_dir(storage / name, trial.name) / EVENTS)
        begins = [event for event in events if event["event"] == "start"]
        ends = [event for event in events if event["event"] == "end"]
        if begins and ends:
            spans.setdefault(begins[0]["pid"], []).append((begins[0]["time"], ends[-1]["time"]))
    return [
        later[0] - earlier[1]
        for found in spans.values()
        for earlier, later in zip(sorted(found), sorted(found)[1:], strict=False)
    ]


def rank_correlation(full: list[Trial], rung: int) -> float:
    """Spearman's, of what all trials had at a step and what they came to; ties are none."""
    reached = [trial for trial in full if any(row["step"] >= rung for row in scored(trial))]
    there = [next(row["val_bpb"] for row in scored(one) if row["step"] >= rung) for one in reached]
    ranks = [
        np.argsort(np.argsort(values)).tolist()
        for values in (there, [score(one) for one in reached])
    ]
    return statistics.correlation(*ranks)


def scored(trial: Trial) -> list[MetricsRow]:
    """The evaluations before any cool-down."""
    return [row for row in trial.rows if "val_bpb" in row and row.get("phase") != "landing"]


def table(cut: list[Trial], full: list[Trial]) -> None:
    """Print all trials in the order of the full sweep."""
    by_name = {trial.name: trial for trial in cut}
    print(
        f"{'rank':>4}  {'trial':5}  {'best of all steps':>17}  {'in the sweep':>12}  {'steps':>5}"
    )
    for rank, trial in enumerate(ranked(full), start=1):
        other = by_name[trial.name]
        print(
            f"{rank:4}  {trial.name:5}  {score(trial):17.4f}  {score(other):12.4f}  "
            f"{other.step:5} {other.outcome}"
        )


def compare(storage: Path, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run a seed's two sweeps; return the figures."""
    keys = [*options.keys, f"seed={seed}"]
    config = load_config(str(options.config), keys)
    if not rungs(config):
        raise SystemExit(f"{options.config} has no rungs: lower tune.grace_period")
    evaluations = -(-config.train.max_steps // config.train.eval_interval)
    unstopped = [
        *keys,
        f"tune.grace_period={evaluations}",
        f"tune.space={json.dumps(to_the_end(config.tune.space))}",
    ]
    cut, result, seconds = sweep(storage, options.config, f"rungs-{seed}", keys)
    full, full_result, full_seconds = sweep(storage, options.config, f"full-{seed}", unstopped)
    table(cut, full)
    beyond = overheads(storage, f"full-{seed}", full)
    ranking = [trial.name for trial in ranked(full)]
    return {
        "seed": seed,
        "trials": result["trials"],
        "steps_share": round(result["steps_run"] / sum(trial.step for trial in full), 3),
        "winner_rank": ranking.index(result["best_trial"]) + 1,
        "best_val_bpb": result["best_val_bpb"],
        "full_best_val_bpb": full_result["best_val_bpb"],
        "behind": round(result["best_val_bpb"] / full_result["best_val_bpb"] - 1, 5),
        "rank_correlation": round(rank_correlation(full, rungs(config)[0]), 3),
        "baseline_val_bpb": full_result["baseline_val_bpb"],
        "seconds": round(seconds, 1),
        "full_seconds": round(full_seconds, 1),
        "overhead_s": round(statistics.median(beyond), 2),
        "overhead_most_s": round(max(beyond), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--folder", type=Path, help="for the sweeps, which stay there")
    parser.add_argument("keys", nargs="*", help="section.field=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptray-tune-") as name:
        storage = (options.folder or Path(name)).resolve()
        print(json.dumps([compare(storage, options, seed) for seed in options.seeds]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
