"""What a sweep's rungs save and cost, against the same trials all run to their end.

    python benchmarks/tune.py shakespeare.txt chat.csv [--small] [--sweep] [--folder runs/tune]
    python benchmarks/tune.py book.txt --seeds 1 2 tune.grace_period=2

For each text and seed, all trials of configs/overfitting_sweep.yaml, or of another config, run
without rungs. Then the sweep is replayed on their curves: in the order in which the seed draws
the trials, and in 50 random ones. With --sweep the sweep of the first seed also runs for real.

The first --characters of a text are used, the last of them for validation, as data.split says; of a
.csv, the first two columns with rows shuffled. Each trial has one core, with one trial per core at
a time: the five grids of a text take about an hour on two cores, or a quarter of that with --small
(half the width, blocks of 64, a vocabulary of 1,024). Curves already in FOLDER are kept, so a
stopped benchmark resumes. Further arguments are config keys for all trials and sweeps; changing
rungs or tune.num_samples between calls reruns nothing.

Prints a table and, last, one JSON line. `share`: the sweep's steps as a share of the grid's.
`behind`: how far the winner's loss is above the grid's best, as a share of it. `rank_correlation`:
Spearman's, between the trials' losses at a rung and their lowest at any step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tiny import ROOT, job_command
from tune_grid import Curve, Grids, Text, jobs_of, prepare
from tune_replay import CLOSE, figures

from gptray.config import Config, load_config
from gptray.tuning.sweep_record import Trial, load_trials, rungs
from gptray.tuning.trial_plan import score

CONFIG = ROOT / "configs" / "overfitting_sweep.yaml"
ORDERS = 50

Figures = Mapping[str, object]


@dataclass(frozen=True)
class Sweep:
    """A text, a seed, the config keys for all trials, and the resolved config."""

    text: Text
    seed: int
    keys: list[str]
    config: Config


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a file, or builtin; or a key")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tune")
    parser.add_argument("--characters", type=int, default=100_000, help="of a text")
    parser.add_argument("--small", action="store_true", help="a quarter of the work")
    parser.add_argument("--sweep", action="store_true", help="run the first seed's, too, on Ray")
    given = parser.parse_args()
    keys = [one for one in given.texts if "=" in one]
    texts = [one for one in given.texts if "=" not in one]
    if given.small:
        keys = small(load_config(str(given.config), ["data.source=builtin"])) + keys
    folder = given.folder.resolve()
    sweeps = [sweep_of(text, seed, given, keys) for seed in given.seeds for text in texts]
    grids = Grids(folder)
    grids.run(job for sweep in sweeps for job in jobs_of(sweep.text, sweep.config))
    found = [measure(sweep, grids) for sweep in sweeps]
    show(found)
    real = [
        real_sweep(sweep, given.config, grids, folder)
        for sweep in sweeps
        if given.sweep and sweep.seed == given.seeds[0]
    ]
    print(json.dumps({"replays": found, "summary": summary(found), "sweeps": real}))
    return 0


def small(config: Config) -> list[str]:
    """Keys that shrink a config's trials: half the width, also in the search space, and so on."""
    space = [dict(entry) for entry in config.tune.space]
    for entry in space:
        paths = cast(list[str], entry.get("paths", []))
        if "model.n_embd" in paths:
            at = paths.index("model.n_embd")
            options = cast(list[list[int]], entry["choice"])
            entry["choice"] = [[*one[:at], one[at] // 2, *one[at + 1 :]] for one in options]
    return [
        f"model.n_embd={config.model.n_embd // 2}",
        "model.n_positions=64",
        "train.block_size=64",
        "data.vocab_size=1024",
        f"tune.space={json.dumps(space)}",
    ]


def sweep_of(source: str, seed: int, given: argparse.Namespace, keys: list[str]) -> Sweep:
    keys = [*keys, f"seed={seed}"]
    config = load_config(str(given.config), ["data.source=builtin", *keys])
    if not rungs(config):
        raise SystemExit(f"{given.config} has no rungs: lower tune.grace_period")
    text = prepare(source, config, given.folder.resolve(), characters=given.characters)
    return Sweep(text, seed, keys, config)


def measure(sweep: Sweep, grids: Grids) -> Figures:
    curves = grids.curves(jobs_of(sweep.text, sweep.config))
    own = figures(sweep.config, curves, orders=ORDERS)
    return {"text": sweep.text.name, "seed": sweep.seed, **own}


def show(found: list[Figures]) -> None:
    """Print a row for each text and seed."""
    print("text             seed  rank correlation  steps  in other orders  rank  behind  close in")
    for row in found:
        correlation = cast(Mapping[str, float], row["rank_correlation"])
        least, mean, most = cast(list[float], row["shares"])
        print(
            f"{row['text']:15.15}  {row['seed']:4}  "
            f"{' '.join(f'{one:.2f}' for one in correlation.values()):>16}  "
            f"{row['share']:5.0%}  {mean:5.0%} ({least:.0%}-{most:.0%})"
            f"  {row['rank']:6}  {row['behind']:6.2%}  {row['close']:8.0%}"
        )


def summary(found: list[Figures]) -> Figures:
    """Means and extremes over all texts and seeds."""
    behind = [cast(float, row["behind"]) for row in found]
    first = [
        next(iter(cast(Mapping[str, float], row["rank_correlation"]).values())) for row in found
    ]
    return {
        "share": round(statistics.fmean(cast(float, row["share"]) for row in found), 3),
        "most_share": max(cast(float, row["share"]) for row in found),
        "close": f"{sum(one <= CLOSE for one in behind)} of {len(behind)}",
        "most_behind": max(behind),
        "first_rank_correlation": round(statistics.fmean(first), 3),
        "least_first_rank_correlation": min(first),
    }


def real_sweep(sweep: Sweep, path: Path, grids: Grids, folder: Path) -> Figures:
    """Run a sweep on Ray, unless its result is kept; compare it with its grid."""
    name = f"{sweep.text.folder.name}-{sweep.seed}"
    kept = folder / "sweeps" / f"{name}.json"
    if not kept.exists():
        result, seconds = run_sweep(sweep, path, folder / "sweeps", name)
        kept.write_text(json.dumps({"seconds": round(seconds, 1), **result}), encoding="utf-8")
    result = json.loads(kept.read_text(encoding="utf-8"))
    trials = load_trials(folder / "sweeps" / name)
    curves = grids.curves(jobs_of(sweep.text, sweep.config))
    best = min(score(curve.trial) for curve in curves)
    found = {
        "text": sweep.text.name,
        "seed": sweep.seed,
        "seconds": result["seconds"],
        "share": round(result["steps_run"] / sum(one.trial.step for one in curves), 3),
        "winner": result["best_trial"],
        "behind": round(result["best_val_bpb"] / best - 1, 5),
        "curve_difference": round(curve_difference(trials, curves), 5),
    }
    print(
        f"{sweep.text.name}, seed {sweep.seed}, on Ray: {found['seconds']} s, {found['share']:.0%} "
        f"of the steps, the winner {found['behind']:.2%} behind"
    )
    return found


def run_sweep(
    sweep: Sweep, path: Path, storage: Path, name: str
) -> tuple[dict[str, object], float]:
    """Run jobs/tune.py; return its JSON line and the seconds it took."""
    began = time.monotonic()
    words = [*sweep.keys, *sweep.text.keys, f"storage_path={storage}", f"name={name}"]
    command = job_command("tune", f"--config={path}", *words)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the sweep {name} failed")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result, time.monotonic() - began


def curve_difference(trials: list[Trial], curves: list[Curve]) -> float:
    """The largest difference in val_bpb between sweep and grid for the same trial and step."""
    full = {
        (curve.trial.name, row["step"]): row["val_bpb"]
        for curve in curves
        for row in curve.trial.rows
    }
    return max(
        abs(row["val_bpb"] - full[trial.name, row["step"]])
        for trial in trials
        for row in trial.rows
        if "val_bpb" in row
    )


if __name__ == "__main__":
    sys.exit(main())
