"""Kill training at random moments and check that the results show no trace of it.

  python benchmarks/chaos.py --rounds 10

First, one run is left undisturbed. Then each round runs the same command and kills, with SIGKILL,
the first worker or the driver (which is started again with the same command). A round passes if
weights, optimizer state and every loss equal the undisturbed run's bit for bit, and metrics.jsonl
has every step once. With --async-validation, a single worker trains while, in the rounds, another
scores its checkpoints, which must not show either. Prints a table and, last, one JSON line; exit
code 1 if any round fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny import TRAINED, finish, job_command, start, write_words

from gptray.storage.files import sha256_of
from gptray.storage.record import read_events, read_metrics

STEPS = 120


def command(storage: Path, name: str, text: Path, *, workers: int) -> list[str]:
    """The training command of a round: dropout, a checkpoint every ten steps."""
    return job_command(
        *("train", f"name={name}", f"storage_path={storage}", f"data.source={text}", *TRAINED),
        *(f"train.max_steps={STEPS}", "train.eval_interval=10", "train.log_interval=1"),
        *("train.patience=null", f"compute.num_workers={workers}", "compute.cpus_per_worker=1"),
    )


def wait_for_step(run_dir: Path, step: int, driver: subprocess.Popen[bytes]) -> None:
    while driver.poll() is None:
        logged = read_metrics(run_dir)
        if logged and logged[-1]["step"] >= step:
            return
        time.sleep(0.005)
    finish(driver)
    raise SystemExit(f"the run ended before step {step}")


def disturb(arguments: list[str], run_dir: Path, victim: str, rng: random.Random) -> int:
    """Run the command, kill the victim at a random moment, and let the run finish."""
    driver = start(arguments)
    step = rng.randrange(1, STEPS)
    wait_for_step(run_dir, step, driver)
    time.sleep(rng.uniform(0, 0.1))
    if victim == "driver":
        driver.kill()
        driver.communicate()
        driver = start(arguments)
    else:
        starts = [event for event in read_events(run_dir) if event["event"] == "start"]
        os.kill(starts[-1]["pid"], signal.SIGKILL)
    finish(driver)
    return step


def fingerprint(run_dir: Path) -> dict[str, Any]:
    """Everything in a run's results that kills must not change."""
    last = run_dir / f"checkpoint_{STEPS:06d}"
    files = [
        run_dir / "model" / "model.safetensors",
        last / "model" / "model.safetensors",
        last / "optimizer.safetensors",
    ]
    timeless = [
        {key: value for key, value in row.items() if key != "tokens_per_sec"}
        for row in read_metrics(run_dir)
    ]
    return {
        "sha256": list(map(sha256_of, files)),
        "metrics": timeless,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--async-validation", action="store_true", help="with train.async_validation=true"
    )
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="gptray-chaos-") as folder:
        storage, text = Path(folder), Path(folder) / "text.txt"
        write_words(text, rng)
        workers, more = 2, []
        if options.async_validation:
            workers, more = 1, ["train.async_validation=true"]
        finish(start(command(storage, "undisturbed", text, workers=workers)))
        expected = fingerprint(storage / "undisturbed")
        assert [row["step"] for row in expected["metrics"]] == list(range(1, STEPS + 1))
        passed = 0
        print(f"{'round':>5}  {'victim':7} {'at step':>7}  {'seconds':>7}  same bits")
        for number in range(1, options.rounds + 1):
            victim = ("worker", "driver")[number % 2]
            name, began = f"round-{number}", time.monotonic()
            arguments = command(storage, name, text, workers=workers) + more
            step = disturb(arguments, storage / name, victim, rng)
            is_same = fingerprint(storage / name) == expected
            passed += is_same
            seconds = time.monotonic() - began
            print(f"{number:5}  {victim:7} {step:7}  {seconds:7.1f}  {is_same}", flush=True)
    print(json.dumps({"rounds": options.rounds, "passed": passed, "seed": options.seed}))
    return 0 if passed == options.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
