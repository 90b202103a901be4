"""How fast a job runs beside another job, or beside a busy process, compared with alone.

Training uses the quick start's shape, generating GPT-2 124M's in int8. Part of benchmarks/all.py.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import generate
from turns import Contestant

HERE = Path(__file__).parent
BUSY = "while True: pass"


def measure(say: Callable[[str], None], *, rounds: int) -> dict[str, dict[str, float]]:
    """For each kind of job, the total speed of two at once, and of one beside a busy process."""
    with tempfile.TemporaryDirectory() as folder:
        generate.make_model("124m", Path(folder))
        jobs = {
            "training": ("train.py", "bf16", ["--shape", "quick", "--steps", "20"], 0),
            "generating": ("generate.py", "int8", ["--model", folder], 32),
        }
        found = {name: _shares(*job, rounds=rounds) for name, job in jobs.items()}
    for name, shares in found.items():
        for case, share in shares.items():
            say(f"contention  {name:12}{case:32}{share:>8.2f}x of one alone")
    return found


def _shares(
    script: str, system: str, arguments: list[str], job: int, *, rounds: int
) -> dict[str, float]:
    pair = [Contestant(str(HERE / script), system, arguments) for _ in range(2)]
    together, beside = [], []
    for contestant in pair:
        contestant.ask(job)  # warms caches
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            alone = pair[0].ask(job)
            both = list(pool.map(lambda one: one.ask(job), pair))
            together.append(sum(alone / seconds for seconds in both))
            with _busy():
                beside.append(alone / pair[0].ask(job))
    for contestant in pair:
        contestant.close()
    return {
        "two at once, together": round(statistics.median(together), 3),
        "beside a busy process": round(statistics.median(beside), 3),
    }


@contextmanager
def _busy() -> Iterator[None]:
    """A process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()
