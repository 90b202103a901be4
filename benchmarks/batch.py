"""Prompts to Parquet, end to end: jobs/generate.py against the usual script.

The usual script calls transformers' generate on left-padded batches of 32 in file order, and
pyarrow at the end. Random weights of a GPT-2 shape, prompts of 4 to 96 tokens, 64 new tokens each,
top-k 50, bf16. Both are timed as whole commands, including start-up, and take turns.

    python benchmarks/batch.py [--shape 124m|10m] [--prompts 2000] [--rounds 1] [KEY=VALUE ...]

KEY=VALUE are settings of the job, such as quantize.weights=int8.

Prints a table and, last, one JSON line with the ratio and the share of an engine's time, from its
first step to its last, that it spent in steps.
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
import pyarrow as pa
from generate import NEW_TOKENS, SHAPES, TOP_K, hf_generate, hf_model, make_model
from pyarrow import parquet
from tiny import job_command

HF_BATCH = 32


def write_prompts(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        words = rng.integers(50_000, size=int(rng.integers(4, 97)))
        rows.append({"id": i, "prompt": " ".join(f"w{word}" for word in words)})
    parquet.write_table(pa.Table.from_pylist(rows), path)


def hf_script(model_dir: str, source: str, target: str) -> None:
    """Generate with transformers over padded batches, and write one Parquet file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_dir, padding_side="left", trust_remote_code=False
    )
    tokenizer.pad_token = tokenizer.eos_token
    model = hf_model(model_dir, "bf16")
    rows = parquet.read_table(source).to_pylist()
    for begin in range(0, len(rows), HF_BATCH):
        batch = rows[begin : begin + HF_BATCH]
        encoded = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        out = hf_generate(model, encoded["input_ids"], NEW_TOKENS, encoded["attention_mask"])
        texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :])
        for row, text in zip(batch, texts, strict=True):
            row["output"] = text
    parquet.write_table(pa.Table.from_pylist(rows), target)


def timed(command: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def measure(shape: str, count: int, rounds: int, settings: list[str]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"gptray": [], "hf": []}
    shares = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = folder / "model"
        make_model(shape, model_dir)
        write_prompts(folder / "prompts.parquet", count)
        for turn in range(rounds):
            taken, stdout = timed(
                job_command(
                    "generate",
                    f"generate.model={model_dir}",
                    f"generate.input_path={folder / 'prompts.parquet'}",
                    f"generate.output_path={folder / f'out-{turn}'}",
                    "generate.precision=bf16",
                    f"sample.max_new_tokens={NEW_TOKENS}",
                    f"sample.min_new_tokens={NEW_TOKENS}",
                    "sample.temperature=1",
                    f"sample.top_k={TOP_K}",
                    *settings,
                )
            )
            seconds["gptray"].append(taken)
            shares.append(json.loads(stdout.splitlines()[-1])["engine_share"])
            source, target = str(folder / "prompts.parquet"), str(folder / "hf.parquet")
            script = [sys.executable, __file__, "--hf", str(model_dir), source, target]
            seconds["hf"].append(timed(script)[0])
    ours, theirs = (statistics.median(seconds[system]) for system in ("gptray", "hf"))
    return {
        "shape": shape,
        "prompts": count,
        "rounds": rounds,
        "settings": settings,
        "seconds": {"gptray": round(ours, 1), "hf": round(theirs, 1)},
        "rows_per_sec": {"gptray": round(count / ours, 2), "hf": round(count / theirs, 2)},
        "ratio": round(theirs / ours, 2),
        "engine_share": round(statistics.median(shares), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hf", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="of the job, such as quantize.weights=int8")
    args = parser.parse_args()
    if args.hf:
        hf_script(*args.hf)
        return
    result = measure(args.shape, args.prompts, args.rounds, args.settings)
    print(f"{'system':10}{'seconds':>10}{'rows/s':>10}")
    for system in ("gptray", "hf"):
        seconds, rate = result["seconds"][system], result["rows_per_sec"][system]
        print(f"{system:10}{seconds:>10}{rate:>10}")
    print(f"ratio {result['ratio']}x, engine stepping {result['engine_share']:.0%} of its time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
