"""Benchmarks gptray on this machine's CPU: hardware limits, chosen backends, peers, contention.

    python benchmarks/all.py [--quick] [--parts limits,backends,train,generate,contention] [--save]

Systems take turns, each in its own process; figures are medians over rounds. transformers,
CTranslate2 and llama.cpp take part if they are installed. It takes about fifteen minutes, or four
with --quick. --save writes a file for this kind of machine to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contention
import generate
import torch
import train
from gpu_parts.machine import describe
from turns import median_ratio, take_turns

from gptray.config import Config, ModelConfig, override
from gptray.generation.loading import faster_decoder
from gptray.training.block_timing import faster_kernels
from gptray.training.device import use_device

HERE = Path(__file__).parent
SHAPES = ("a", "quick", "b16", "c", "llama")
# Generation uses the shape of GPT-2 124M.
DECODED = "124m"
GEMM, MEMORY_BYTES, ROUNDS = 2048, 1 << 30, 5

Say = Callable[[str], None]


def best_seconds(work: Callable[[], object]) -> float:
    """The least seconds of a few rounds, after a warm-up."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def limits(say: Say) -> dict[str, float]:
    """TFLOP/s (TOPS for int8) of square GEMMs by dtype, and GB/s of reading memory."""
    found: dict[str, float] = {}
    floats = torch.randn(GEMM, GEMM)
    halves, bytes_ = floats.bfloat16(), floats.to(torch.int8)
    products: dict[str, Callable[[], object]] = {
        "fp32": lambda: floats @ floats,
        "bf16": lambda: halves @ halves,
        "int8": lambda: torch._int_mm(bytes_, bytes_),
    }
    for name, product in products.items():
        found[f"{name} GEMM, T/s"] = round(2 * GEMM**3 / best_seconds(product) / 1e12, 3)
    memory = torch.ones(MEMORY_BYTES // 4)
    found["memory read, GB/s"] = round(MEMORY_BYTES / best_seconds(memory.sum) / 1e9, 1)
    for name, value in found.items():
        say(f"limits      {name:32}{value:>10,}")
    return found


def backends(say: Say) -> dict[str, str]:
    """Which backend auto chooses for each shape, and why."""
    found = {}
    use_device(Config(), torch.device("cpu"))
    for name in SHAPES:
        found[f"train {name}"] = faster_kernels(train_config(train.SHAPES[name])).why
    shape = ModelConfig(n_positions=generate.N_POSITIONS, **generate.SHAPES[DECODED])
    for weights in ("none", "int8"):
        config = override(Config(), {"quantize.weights": weights})
        found[f"generate {DECODED} {weights}"] = faster_decoder(
            config, shape, max_batch_size=generate.MAX_BATCH_SIZE
        ).why
    for name, why in found.items():
        say(f"backends    {name:20}{why}")
    return found


def train_config(shape: train.Shape) -> Config:
    return override(
        Config(),
        {
            **{f"model.{name}": value for name, value in shape.network.items()},
            "train.block_size": shape.block_size,
            "train.global_batch_size": shape.batch_size,
        },
    )


def training(say: Say, *, quick: bool) -> dict[str, Any]:
    """A training step in bf16 with auto and with each backend, compared with transformers."""
    systems = generate.installed(["hf-bf16", "bf16"]) + ["bf16:native", "bf16:torch"]
    found = {}
    for name in SHAPES:
        steps = {"a": 20, "quick": 5, "llama": 5}.get(name, 1 if quick else 3)
        rounds = (1 if name == "c" else 3) if quick else 7
        arguments = ["--shape", name, "--steps", str(steps)]
        seconds = take_turns(str(HERE / "train.py"), systems, arguments, [0], rounds)[0]
        tokens = train.SHAPES[name].batch_size * train.SHAPES[name].block_size
        found[name] = compared(seconds, tokens)
        tell(say, f"train {name}", found[name])
    return found


def generation(say: Say, *, quick: bool) -> dict[str, Any]:
    """GPT-2 124M's shape in int8 and bf16, compared with transformers, CTranslate2, llama.cpp."""
    systems = generate.installed(["hf-bf16", "ct2-int8", "llama-q8_0"])
    systems += ["bf16", "bf16:native", "bf16:torch", "int8"]
    batches = [1, 32] if quick else [1, 8, 32, 64]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        generate.make_model(DECODED, Path(folder))
        script = str(HERE / "generate.py")
        arguments = ["--model", folder]
        all_seconds = take_turns(script, systems, arguments, batches, 1 if quick else 3)
        for batch, seconds in all_seconds.items():
            found[f"B={batch}"] = compared(seconds, batch * generate.NEW_TOKENS)
            tell(say, f"generate {batch}", found[f"B={batch}"])
    return found


def compared(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Median tokens per second of each system, and how many times as fast bf16 is."""
    return {
        "tokens_per_sec": {
            name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()
        },
        "bf16 against": {
            name: median_ratio(seconds["bf16"], times)
            for name, times in seconds.items()
            if name != "bf16"
        },
    }


def tell(say: Say, what: str, found: dict[str, Any]) -> None:
    for name, rate in found["tokens_per_sec"].items():
        ratio = found["bf16 against"].get(name)
        beside = f"   bf16 is {ratio:.2f}x" if ratio else ""
        say(f"{what:12}{name:20}{rate:>12,} tokens/s{beside}")


def main() -> None:
    parts = ("limits", "backends", "train", "generate", "contention")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="about four minutes")
    parser.add_argument("--parts", default=",".join(parts), help="of " + " ".join(parts))
    parser.add_argument("--save", action="store_true", help="write a file to benchmarks/results")
    args = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    machine = describe(torch.device("cpu"))
    say(", ".join(f"{key} {value}" for key, value in machine.items() if value))
    run: dict[str, Callable[[], Any]] = {
        "limits": lambda: limits(say),
        "backends": lambda: backends(say),
        "train": lambda: training(say, quick=args.quick),
        "generate": lambda: generation(say, quick=args.quick),
        "contention": lambda: contention.measure(say, rounds=1 if args.quick else 3),
    }
    found = {"machine": machine, **{part: run[part]() for part in args.parts.split(",")}}
    lines.append(json.dumps(found))
    print(lines[-1])
    if args.save:
        name = re.sub(r"\W+", "-", machine["processor"]).strip("-").lower()
        (HERE / "results" / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
