"""Rate and peak memory of preparing a large text: a .txt file, the same as .jsonl and on one line.

The text is made from the builtin documents' paragraphs with a seed. Memory is measured in
the driver and the tasks (proportional set size without shared memory, so without Ray's object
store). On a busy machine, megabytes per processor second say more than megabytes per second.

  python benchmarks/prepare.py --megabytes 1000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptray.config import Config
from gptray.data.builtin import builtin_documents
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.prepare.run import prepare

_KOREAN = (
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\ub3c4 \uadf8\ub300\ub85c \ub3cc\uc544\uc628\ub2e4 \U0001f642"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1000, help="text per file")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["txt", "jsonl", "line"],
        help="txt, jsonl, line (a .txt of one line), dna (letters without a space)",
    )
    parser.add_argument("--tokenizer", default="bpe")
    arguments = parser.parse_args()
    columns = ("mb", "seconds", "mb_per_sec", "mb_per_cpu_sec", "tokens_per_sec", "peak_mb")
    print(f"{'file':12}", *(f"{name:>14}" for name in columns), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        for kind in arguments.formats:
            name = f"text.{kind}" if kind in ("txt", "jsonl") else f"{kind}.txt"
            path = write_text(Path(folder) / name, arguments.megabytes * 1_000_000)
            row = measure(path, Path(folder), arguments.tokenizer)
            print(f"{row['file']:12}", *(f"{row[name]:14.2f}" for name in columns), flush=True)
            results.append(row)
            path.unlink()
    print(json.dumps({"cpus": len(os.sched_getaffinity(0)), "results": results}))


def write_text(path: Path, size: int) -> Path:
    """Write about `size` bytes of paragraphs in a seeded order; one .txt is one document."""
    draw = random.Random(0)
    paragraphs = [p for text in builtin_documents() for p in text.split("\n\n")]
    paragraphs.append(_KOREAN)
    written = 0
    with path.open("w", encoding="utf-8", newline="") as stream:
        while written < size:
            text = "\n\n".join(draw.choices(paragraphs, k=8))
            if path.name == "line.txt":
                text = " ".join(text.split()) + " "
            elif path.name == "dna.txt":
                text = "".join(draw.choices("ACGT", k=10_000))
            line = json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text
            stream.write(line + "\n\n" if path.name == "text.txt" else line)
            written += len(text.encode())
    return path


def measure(path: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    config = Config(storage_path=str(folder), data={"source": str(path), "tokenizer": tokenizer})
    watch = Watch()
    began = time.perf_counter()
    with watch:
        data = prepare(config)
    seconds = time.perf_counter() - began
    megabytes = data.manifest["bytes"] / 1e6
    splits = data.manifest["splits"].values()
    return {
        "file": path.name,
        "mb": megabytes,
        "seconds": seconds,
        "mb_per_sec": megabytes / seconds,
        "mb_per_cpu_sec": megabytes / watch.cpu_seconds,
        "tokens_per_sec": sum(entry["tokens"] for entry in splits) / seconds,
        "peak_mb": watch.peak_bytes / 1e6,
    }


class Watch:
    """The total memory and processor time of this process and its Ray workers."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._began: dict[int, float] = {}
        self._now: dict[int, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._began = {pid: _cpu_seconds(pid) for pid in [os.getpid(), *_workers()]}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def cpu_seconds(self) -> float:
        return sum(now - self._began.get(pid, 0.0) for pid, now in self._now.items())

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(0.25)
            pids = [os.getpid(), *_workers()]
            self.peak_bytes = max(self.peak_bytes, sum(_private_bytes(pid) for pid in pids))
            for pid in pids:  # a process that has just ended reads as 0
                self._now[pid] = max(self._now.get(pid, 0.0), _cpu_seconds(pid))


def _workers() -> Iterator[int]:
    """Descendants of this process that Ray has named as workers."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            status = _read(entry / "status")
            parent = [line for line in status.splitlines() if line.startswith("PPid:")]
            parents[int(entry.name)] = int(parent[0].split()[1]) if parent else 0
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and _read(Path(f"/proc/{pid}/cmdline")).startswith("ray::"):
            yield pid


def _private_bytes(pid: int) -> int:
    fields = dict(
        line.split(":") for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()[1:]
    )
    return sum(int(fields.get(name, "0 kB").split()[0]) << 10 for name in ("Pss_Anon", "Pss_File"))


def _cpu_seconds(pid: int) -> float:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    ticks = sum(map(int, fields[11:13]))  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:  # the process has ended
        return ""


if __name__ == "__main__":
    main()
