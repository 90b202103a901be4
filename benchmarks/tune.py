"""What ASHA saves and what it costs: a sweep against the same trials, all run to their end.

  python benchmarks/tune.py

Runs configs/overfitting_demo.yaml as it is, then once more with no rungs and without early
stopping inside the trials, so that each makes all its steps. Prints both rankings, the time that a
trial takes beyond its own training loop (from the end of one to the first step of the next in the
same process) and, last, one JSON line. Further arguments are keys of the config, such as
train.max_steps=300, for both.
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

from gptray.config import load_config
from gptray.record import EVENTS, read_rows
from gptray.tuning.sweep_record import Trial, load_trials, trial_dir
from gptray.tuning.trial_plan import ranked, score

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "overfitting_demo.yaml"


def sweep(storage: Path, name: str, keys: list[str]) -> tuple[list[Trial], dict[str, Any], float]:
    """Run a sweep; return its trials, its JSON line and its seconds."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), f"--config={CONFIG}"]
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


def table(cut: list[Trial], full: list[Trial]) -> None:
    """Print all trials in the order of the full sweep."""
    by_name = {trial.name: trial for trial in cut}
    print(f"{'rank':>4}  {'trial':5}  {'best of all steps':>17}  {'with ASHA':>9}  {'steps':>5}")
    for rank, trial in enumerate(ranked(full), start=1):
        other = by_name[trial.name]
        print(
            f"{rank:4}  {trial.name:5}  {score(trial):17.4f}  {score(other):9.4f}  "
            f"{other.step:5} {other.outcome}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("keys", nargs="*", help="section.field=value")
    options = parser.parse_args()
    config = load_config(str(CONFIG), options.keys)
    evaluations = -(-config.train.max_steps // config.train.eval_interval)
    unstopped = [
        *options.keys,
        f"tune.grace_period={evaluations}",
        f"tune.space={json.dumps(to_the_end(config.tune.space))}",
    ]
    with tempfile.TemporaryDirectory(prefix="gptray-tune-") as name:
        storage = Path(name)
        cut, result, seconds = sweep(storage, "asha", options.keys)
        full, full_result, full_seconds = sweep(storage, "full", unstopped)
        beyond = overheads(storage, "full", full)
    table(cut, full)
    ranking = [trial.name for trial in ranked(full)]
    steps = sum(trial.step for trial in full)
    print(
        json.dumps(
            {
                "trials": result["trials"],
                "steps_share": round(result["steps_run"] / steps, 3),
                "winner_rank": ranking.index(result["best_trial"]) + 1,
                "best_val_bpb": result["best_val_bpb"],
                "full_best_val_bpb": full_result["best_val_bpb"],
                "baseline_val_bpb": full_result["baseline_val_bpb"],
                "seconds": round(seconds, 1),
                "full_seconds": round(full_seconds, 1),
                "overhead_s": round(statistics.median(beyond), 2),
                "overhead_most_s": round(max(beyond), 2),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
