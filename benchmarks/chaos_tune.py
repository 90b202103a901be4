"""Kill a sweep's driver at random moments and check that the same command completes the sweep.

  python benchmarks/chaos_tune.py --kills 5

A sweep runs once undisturbed and once with kills: SIGKILL for the driver at random moments, then
the same command again. Passes if both have the same trials, each ended once, with every logged step
once; if whatever both measured is equal bit for bit (how far rungs let a trial go depends on the
order of arrival); and if there are a winner, its model, its config and the report. Prints what
happened and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from pyarrow import parquet
from tiny import TRAINED, finish, job_command, start, write_words

from gptray.config import load_config
from gptray.storage.record import METRICS, read_rows
from gptray.tuning.sweep_record import TRIALS, load_sweep, load_trials, trial_dir

SPACE = """[
  {path: optim.lr, choice: [3e-2, 1e-2, 1e-3, 1e20]},
  {path: model.dropout, uniform: [0, 0.3]},
  {path: data.split, choice: ['90:10', '80:10:10']},
]"""


def command(storage: Path, name: str, text: Path) -> list[str]:
    """A sweep of eight short trials, two at a time, and three repetitions."""
    return job_command(
        *("tune", f"name={name}", f"storage_path={storage}", f"data.source={text}", *TRAINED),
        *("train.max_steps=90", "train.eval_interval=10", "train.log_interval=5"),
        *("optim.min_lr=0", "optim.warmup_steps=5"),
        *(f"tune.space={SPACE}", "tune.num_samples=7", "tune.replicates=1"),
    )


def progress(sweep: Path) -> int:
    """How many rows the trials have logged, plus the lines of the record."""
    names = [trial.name for trial in load_trials(sweep)] if (sweep / TRIALS).exists() else []
    logged = [len(read_rows(trial_dir(sweep, name) / METRICS)) for name in names]
    return sum(logged) + len(read_rows(sweep / TRIALS))


def disturb(arguments: list[str], sweep: Path, moments: list[int], rng: random.Random) -> int:
    """Run the sweep with a kill at each moment; return how many there were."""
    driver = start(arguments)
    for number, moment in enumerate(moments):
        while progress(sweep) < moment:
            if driver.poll() is not None:
                finish(driver)
                return number
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        if driver.poll() is not None:
            return number
        driver.kill()
        driver.communicate()
        ended = sum(trial.outcome is not None for trial in load_trials(sweep))
        print(f"kill {number + 1}: {ended} trials had ended", flush=True)
        driver = start(arguments)
    finish(driver)
    return len(moments)


def is_whole(sweep: Path) -> bool:
    """Whether every trial ended once, with each step once, and the sweep is complete.

    An end that a promotion undoes does not count.
    """
    events = read_rows(sweep / TRIALS)
    ends = collections.Counter(e["trial"] for e in events if e["event"] == "ended")
    ends.subtract(e["trial"] for e in events if e["event"] == "promoted")
    plans = collections.Counter(e["trial"] for e in events if e["event"] == "planned")
    trials = load_trials(sweep)
    steps = [[row["step"] for row in trial.rows] for trial in trials]
    assert load_config(str(sweep / "best.yaml"), []).tune.space == []
    return (
        set(ends.values()) == set(plans.values()) == {1}
        and ends.keys() == plans.keys()
        and all(sorted(set(one)) == one for one in steps)
        and [event["event"] for event in events].count("winner") == 1
        and (sweep / "model" / "model.safetensors").is_file()
        and (sweep / "report.html").is_file()
        and parquet.read_table(sweep / "trials.parquet").num_rows == len(trials)
    )


def is_same(calm: Path, disturbed: Path) -> bool:
    """Whether all that both sweeps measured, in trials with the same values, is equal."""
    for one, other in zip(load_trials(calm), load_trials(disturbed), strict=True):
        if one.replicate_of is None and (one.name, one.values) != (other.name, other.values):
            return False
        if one.values != other.values:
            continue  # which trials are repeated depends on which were stopped
        rows = {row["step"]: row for row in one.rows}
        for row in other.rows:
            before = rows.get(row["step"], row)
            if {**before, "tokens_per_sec": 0} != {**row, "tokens_per_sec": 0}:
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="gptray-chaos-") as name:
        storage, text = Path(name), Path(name) / "text.txt"
        write_words(text, rng)
        finish(start(command(storage, "calm", text)))
        total = progress(storage / "calm")
        moments = sorted(rng.sample(range(int(0.9 * total)), options.kills))
        arguments = command(storage, "out", text)
        kills = disturb(arguments, storage / "out", moments, rng)
        again = finish(start(arguments))
        result = {
            "kills": kills,
            "trials": again["trials"],
            "whole": is_whole(storage / "calm") and is_whole(storage / "out"),
            "same": is_same(storage / "calm", storage / "out"),
            "winner": load_sweep(storage / "out").winner == again["best_trial"],
        }
    print(json.dumps(result))
    passed = result["whole"] and result["same"] and result["winner"]
    return 0 if passed and kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
