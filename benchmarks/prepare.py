"""Rate and peak memory of preparing a large text: one .txt file and the same text as .jsonl.

The text is made from the builtin documents' paragraphs with a seed. Memory is the driver's and the
tasks' processes (proportional set size without shared memory, so without Ray's object store).

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
from gptray.runners.cluster import ray_cluster
from gptray.runners.prepare import prepare

_KOREAN = (
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\ub3c4 \uadf8\ub300\ub85c \ub3cc\uc544\uc628\ub2e4 \U0001f642"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1000, help="text per file")
    parser.add_argument("--formats", nargs="+", default=["txt", "jsonl"])
    parser.add_argument("--tokenizer", default="bpe")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        for kind in arguments.formats:
            path = write_text(Path(folder) / f"text.{kind}", arguments.megabytes * 1_000_000)
            results.append(measure(path, Path(folder), arguments.tokenizer))
            path.unlink()
    print(f"{'file':10} {'MB':>6} {'seconds':>8} {'MB/s':>6} {'tokens/s':>10} {'peak MB':>8}")
    for row in results:
        print(
            f"{row['file']:10} {row['mb']:6.0f} {row['seconds']:8.1f} {row['mb_per_sec']:6.2f} "
            f"{row['tokens_per_sec']:10.0f} {row['peak_mb']:8.0f}"
        )
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
            line = json.dumps({"text": text}) if path.suffix == ".jsonl" else text + "\n"
            stream.write(line + "\n")
            written += len(text.encode())
    return path


def measure(path: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    config = Config(storage_path=str(folder), data={"source": str(path), "tokenizer": tokenizer})
    peak = PeakMemory()
    began = time.perf_counter()
    with peak:
        data = prepare(config)
    seconds = time.perf_counter() - began
    splits = data.manifest["splits"].values()
    return {
        "file": path.name,
        "mb": data.manifest["bytes"] / 1e6,
        "seconds": seconds,
        "mb_per_sec": data.manifest["bytes"] / 1e6 / seconds,
        "tokens_per_sec": sum(entry["tokens"] for entry in splits) / seconds,
        "peak_mb": peak.bytes / 1e6,
    }


class PeakMemory:
    """The most memory that this process and Ray's workers under it held together."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            held = sum(_private_bytes(pid) for pid in _workers())
            self.bytes = max(self.bytes, held + _private_bytes(os.getpid()))


def _workers() -> Iterator[int]:
    """Processes with this one above them that Ray has named as workers."""
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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


if __name__ == "__main__":
    main()
