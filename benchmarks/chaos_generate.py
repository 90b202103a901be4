"""Kill a batch generation job at random moments and check that every row is there once, unchanged.

  python benchmarks/chaos_generate.py --prompts 10000 --kills 10

The job runs once undisturbed and once with kills: SIGKILL in turn for an engine and for the driver,
which is started again with the same command. Meanwhile, every visible Parquet file is opened again
and again. Passes if each id is there exactly once, all rows equal the undisturbed run's, and no
file was ever broken. Prints what happened and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from tiny import WORDS, job_command

from gptray.config import ModelConfig
from gptray.data.tokenizer import train_bpe
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained


def make_model(folder: Path) -> None:
    tokenizer = train_bpe([" ".join(WORDS)] * 20, 320)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=96, initializer_range=0.2)
    save_pretrained(
        GPT(config, vocab_size=tokenizer.vocab_size), folder, eos_token_id=tokenizer.eos_id
    )
    tokenizer.save(folder)


def write_prompts(path: Path, count: int, rng: random.Random) -> None:
    rows = (
        {
            "id": f"row-{i}",
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
            "seed": rng.randrange(2**31),
            "temperature": rng.choice([0.0, 0.7, 1.2]),
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def command(folder: Path, output: Path, rows_per_file: int) -> list[str]:
    return job_command(
        "generate",
        "--verbose",  # logs the engines' process ids
        f"generate.model={folder / 'model'}",
        f"generate.input_path={folder / 'prompts.jsonl'}",
        f"generate.output_path={output}",
        f"generate.rows_per_file={rows_per_file}",
        "generate.num_workers=2",
        "generate.precision=fp32",
        "compute.cpus_per_worker=1",
        "compute.max_failures=-1",
        "sample.max_new_tokens=32",
    )


class Driver:
    """The job's process, and its engines' process ids from its log."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.engines: list[int] = []
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"an engine runs as process (\d+)", line)
            if found:
                self.engines.append(int(found[1]))

    def finish(self) -> None:
        self.process.wait()
        self._reader.join()
        if self.process.returncode:
            raise SystemExit("the job failed:\n" + "".join(self.lines[-20:]))


class Reader:
    """Opens every visible file over and over until closed, counting opened and broken ones."""

    def __init__(self, output: Path) -> None:
        self.opened, self.broken = 0, 0
        self._output, self._stop = output, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            for path in self._output.glob("*.parquet"):
                self.opened += 1
                try:
                    parquet.read_table(path)
                except (OSError, pa.ArrowException):
                    self.broken += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def disturb(arguments: list[str], output: Path, parts: int, kills: int, rng: random.Random) -> None:
    """Run the job with `kills` kills at random moments, of an engine and the driver in turn."""
    moments = sorted(rng.sample(range(parts - 2), kills))
    driver = Driver(arguments)
    for number, moment in enumerate(moments):
        while len(list(output.glob("*.parquet"))) < moment or not driver.engines:
            if driver.process.poll() is not None:
                driver.finish()
                raise SystemExit("the job ended before all kills were done")
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        done = len(list(output.glob("*.parquet")))
        if number % 2:
            driver.process.kill()
            driver.process.wait()
            driver = Driver(arguments)
        else:
            victim = driver.engines.pop(rng.randrange(len(driver.engines)))
            os.kill(victim, signal.SIGKILL)
        name = ("engine", "driver")[number % 2]
        print(f"kill {number + 1:2}: {name}, {done} of {parts} files there", flush=True)
    driver.finish()


def all_rows(output: Path) -> list[dict[str, Any]]:
    tables = [parquet.read_table(path) for path in sorted(output.glob("*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rows-per-file", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="gptray-chaos-") as name:
        folder = Path(name)
        make_model(folder / "model")
        write_prompts(folder / "prompts.jsonl", options.prompts, rng)
        Driver(command(folder, folder / "calm", options.rows_per_file)).finish()
        reader = Reader(folder / "out")
        parts = -(-options.prompts // options.rows_per_file)
        arguments = command(folder, folder / "out", options.rows_per_file)
        disturb(arguments, folder / "out", parts, options.kills, rng)
        reader.close()
        rows, calm = all_rows(folder / "out"), all_rows(folder / "calm")
    result = {
        "prompts": options.prompts,
        "kills": options.kills,
        "rows": len(rows),
        "ids": len({row["id"] for row in rows}),
        "rows_equal": rows == calm,
        "files_opened": reader.opened,
        "files_broken": reader.broken,
    }
    print(json.dumps(result))
    exactly_once = result["rows"] == result["ids"] == options.prompts
    return 0 if exactly_once and result["rows_equal"] and not reader.broken else 1


if __name__ == "__main__":
    sys.exit(main())
