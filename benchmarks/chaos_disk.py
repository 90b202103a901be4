"""Fill the disk under every job at each moment when it writes, and check that nothing is lost.

  python benchmarks/chaos_disk.py                 needs root, to mount a tmpfs
  python benchmarks/chaos_disk.py --only train-checkpoint tune-trial

Each way first runs undisturbed. Then the same command runs on a tmpfs that is filled at a given
moment, except for the bytes that the way leaves. It must end with one sentence that names what
could not be written, exit code 1, no traceback and no second attempt; once there is space, the same
command must succeed, with the same bits as the undisturbed one. If the job can do without what
could not be written (a report, the native library), it must succeed at once and say so. Prints a
table and, last, one JSON line; exit code 1 if any way fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import parquet
from tiny import TRAINED, job_command, write_words

from gptray.storage.record import read_events, read_metrics, read_rows

SIZE_MB, STEPS = 64, 60
TRAIN = [*TRAINED, "model.n_embd=96", "train.precision=fp32", f"train.max_steps={STEPS}"]
TRAIN += ["train.eval_interval=10", "train.log_interval=1", "train.patience=null"]
SPACE = "tune.space=[{path: optim.lr, loguniform: [1e-3, 1e-2]}]"
TUNE = [*TRAIN, SPACE, "tune.num_samples=3", "tune.max_concurrent_trials=1"]
# For that shape, more bytes than a checkpoint, but fewer than a checkpoint and a model.
CHECKPOINT = 2_900_000

Moment = Callable[[Path], bool]


@dataclass(frozen=True)
class Way:
    """A way of running out of disk. `{}` stands for the disk in the command's words.

    before: jobs to run first, with enough space.
    at: when the disk is filled; None: before the job starts.
    leaves: how many bytes stay free.
    compared: globs of files that must equal the undisturbed run's.
    goes_on: whether the job can do without what could not be written.
    """

    name: str
    job: str
    words: list[str]
    at: Moment | None
    leaves: int
    compared: list[str]
    before: list[list[str]] = field(default_factory=list)
    environment: str | None = None
    goes_on: bool = False


def step_is(step: int, run: str = "run") -> Moment:
    """The moment when a run has logged a step."""

    def is_there(disk: Path) -> bool:
        logged = read_metrics(disk / run)
        return bool(logged) and logged[-1]["step"] >= step

    return is_there


def has(pattern: str) -> Moment:
    """The moment when a file matches the glob."""
    return lambda disk: any(disk.glob(pattern))


def last_is_evaluated(disk: Path) -> bool:
    events = read_events(disk / "run")
    return any(one["event"] == "evaluated" and one["step"] == STEPS for one in events)


def ways(text: Path, prompts: Path) -> list[Way]:
    source = f"data.source={text}"
    run = ["storage_path={}", "name=run", source, *TRAIN, "compute.cpus_per_worker=1"]
    model = ["run/model/model.safetensors", f"run/checkpoint_{STEPS:06d}/**/*.safetensors"]
    sweep = ["storage_path={}", "name=sweep", source, *TUNE]
    swept = ["sweep/model/model.safetensors", "sweep/best.yaml"]
    trained = ["train", *run]
    batch = [f"generate.input_path={prompts}", "generate.output_path={}/out"]
    batch += ["generate.model={}/run", "sample.max_new_tokens=16", "sample.temperature=1"]
    batch += ["generate.backend=torch"]
    out = ["out/part-*.parquet"]
    prepare = ["storage_path={}", source, "data.tokenizer=bpe", "data.vocab_size=300"]
    evaluate = ["storage_path={}", "name=run", "evaluate.passages=2", "evaluate.train_tokens=2000"]
    return [
        Way("prepare-shards", "prepare", prepare, None, 60_000, ["data/*/*.bin"]),
        Way("train-checkpoint", "train", run, step_is(12), 65_536, model),
        Way("train-publish", "train", run, step_is(12), CHECKPOINT, model),
        Way("train-journal", "train", run, step_is(12), 0, model),
        Way("train-report", "train", run, last_is_evaluated, 8_192, model, goes_on=True),
        Way("train-two-workers", "train", [*run, "compute.num_workers=2"], step_is(12), 0, model),
        Way("tune-trial", "tune", sweep, step_is(1, "sweep/trials/0001"), 65_536, swept),
        Way("tune-record", "tune", sweep, has("sweep/trials/0001/model"), 0, swept),
        Way("batch-staging", "generate", batch, None, 4_096, out, [trained]),
        Way("batch-part", "generate", batch, has("out/.*/*"), 4_096, out, [trained]),
        Way("batch-manifest", "generate", batch, has("out/part-00000*"), 0, out, [trained]),
        Way("evaluate", "evaluate", evaluate, None, 0, ["run/evaluation.json"], [trained]),
        Way(
            "native-cache",
            "train",
            [*run, "train.precision=bf16", "name=run"],
            None,
            0,
            [],
            environment="XDG_CACHE_HOME",
            goes_on=True,
        ),  # fmt: skip
        Way("ray-session", "train", run, None, 0, [], environment="RAY_TMPDIR"),
    ]


class Disk:
    """A tmpfs that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs"]
        subprocess.run(["mount", *options, str(folder)], check=True)

    def fill(self, *, leaves: int) -> None:
        """Take all space except `leaves` bytes."""
        with (self.folder / ".filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.free - leaves))

    def make_room(self) -> None:
        (self.folder / ".filler").unlink(missing_ok=True)

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def command(job: str, words: list[str], disk: Path) -> list[str]:
    named = dict(word.replace("{}", str(disk), 1).split("=", 1) for word in words)
    return job_command(job, *(f"{key}={value}" for key, value in named.items()))


def run(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def run_full(way: Way, storage: Path, disk: Disk, environment: dict[str, str]) -> tuple[int, str]:
    """Run the way's command, and fill the disk at the way's moment."""
    arguments = command(way.job, way.words, storage)
    if way.at is None:
        disk.fill(leaves=way.leaves)
        return run(arguments, environment)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        driver = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True
        )
        while driver.poll() is None and not way.at(disk.folder):
            time.sleep(0.002)
        disk.fill(leaves=way.leaves)
        driver.wait()
        errors.seek(0)
        return driver.returncode, errors.read()


def digests(storage: Path, patterns: list[str]) -> dict[str, str]:
    """Digests of the compared files: of an evaluation's numbers, a batch's rows, others' bytes."""
    found = {}
    for path in sorted(path for pattern in patterns for path in storage.glob(pattern)):
        content = path.read_bytes()
        if path.suffix == ".json":
            splits = json.loads(content)["splits"]
            content = json.dumps(splits).encode()
        if path.suffix == ".parquet":  # the column `model` has the model's path
            table = parquet.read_table(path).drop_columns(["model"])
            content = repr(table.to_pylist()).encode()
        if path.suffix == ".yaml":
            content = content.replace(str(storage).encode(), b"")
        name = path.relative_to(storage).as_posix()
        name = "/".join("*" if name.startswith("data/") and n == 1 else part
                        for n, part in enumerate(name.split("/")))  # fmt: skip
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def faults(way: Way, storage: Path, code: int, errors: str) -> list[str]:
    """What is wrong with how the job ended on the full disk."""
    found = []
    # A report that could not be written causes one more line, a warning.
    said = [line for line in errors.splitlines() if "cannot write" in line or "no room" in line]
    told = sum(way.goes_on or line.startswith(f"{way.job}: ") for line in said)
    if code != (0 if way.goes_on else 1):
        found.append(f"exit code {code}")
    if "Traceback" in errors:
        found.append("traceback")
    if told != 1:
        found.append(f"{told} sentences")
    for events in storage.rglob("events.jsonl"):
        starts = sum(row["event"] == "start" for row in read_rows(events))
        if starts > 1:
            found.append(f"{starts} attempts")
    return found


class Calm:
    """Undisturbed runs, each made once, and the jobs that must run before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def before(self, way: Way, storage: Path) -> None:
        """Put the results of the way's earlier jobs into `storage`."""
        if way.before:
            made = self._once(way.before)
            shutil.copytree(made, storage, dirs_exist_ok=True, symlinks=True)

    def outcome(self, way: Way) -> dict[str, str]:
        """The digests of the way's undisturbed run."""
        made = self._once([*way.before, [way.job, *way.words]])
        return digests(made, way.compared)

    def _once(self, jobs: list[list[str]]) -> Path:
        """The storage in which these jobs have run, one after another."""
        key = json.dumps(jobs)
        if key not in self._made:
            self._made[key] = storage = self._folder / f"{len(self._made)}"
            storage.mkdir(parents=True)
            for job, *words in jobs:
                self._do(job, words, storage)
        return self._made[key]

    def _do(self, job: str, words: list[str], storage: Path) -> None:
        code, errors = run(command(job, words, storage), dict(os.environ))
        if code:
            raise SystemExit(f"{job} failed undisturbed: {errors[-2000:]}")


def try_way(way: Way, folder: Path, calm: Calm, *, verbose: bool) -> list[str]:
    """Run a way; return what went wrong."""
    on_disk = way.environment is None
    disk = Disk(folder / "d")
    storage = disk.folder if on_disk else folder / "storage"
    environment = dict(os.environ) | ({} if on_disk else {str(way.environment): str(disk.folder)})
    try:
        calm.before(way, storage)
        expected = calm.outcome(way)
        code, errors = run_full(way, storage, disk, environment)
        told = ("cannot write", "no room")
        lines = [line for line in errors.splitlines() if any(one in line for one in told)]
        if verbose or not lines:
            lines = errors.splitlines()[-30:]
        print("\n".join(f"    {line}" for line in lines), flush=True)
        found = faults(way, storage, code, errors)
        disk.make_room()
        code, errors = run(command(way.job, way.words, storage), environment)
        if code:
            found.append(f"with room: exit code {code}: {errors[-300:]}")
        if digests(storage, way.compared) != expected:
            found.append("other bits")
        return found
    finally:
        disk.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", help="the ways to try, by name")
    parser.add_argument("--verbose", action="store_true", help="show what the jobs say")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("this needs root, to mount a tmpfs")
    passed = tried = 0
    with tempfile.TemporaryDirectory(prefix="gd-") as name:
        folder = Path(name)
        text, prompts = folder / "text.txt", folder / "prompts.jsonl"
        write_words(text, random.Random(0))
        lines = (json.dumps({"id": f"{n}", "prompt": f"ray {n}"}) + "\n" for n in range(300))
        prompts.write_text("".join(lines), "utf-8")
        calm = Calm(folder / "calm")
        for way in ways(text, prompts):
            if options.only and way.name not in options.only:
                continue
            tried, began = tried + 1, time.monotonic()
            place = folder / f"{tried}"  # short, since Ray keeps sockets below it
            place.mkdir()
            found = try_way(way, place, calm, verbose=options.verbose)
            passed += not found
            seconds = time.monotonic() - began
            print(f"{way.name:18} {seconds:6.1f} s  {'; '.join(found) or 'passed'}", flush=True)
    print(json.dumps({"ways": tried, "passed": passed}))
    return 0 if passed == tried else 1


if __name__ == "__main__":
    sys.exit(main())
