"""Tokens per second of gptray's training step against a plain loop around a transformers model.

Shapes are of GPT-2 and of Llama. All systems take turns on the same shape and batch, each in its
own process; ratios are medians over rounds.

    python benchmarks/train.py [--shape c] [--compile] [--systems hf-fp32,hf-bf16,bf16]

ray-bf16 runs the step in a Ray Train worker; its ratio to bf16 is the overhead of Ray. bf16 uses
the backend that train.backend=auto chooses; bf16:native and bf16:torch name one. With --rank,
gptray's systems and hf-peft train an adapter of all linear layers of a frozen bf16 network.
Prints a table with the peak memory of each process and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import atexit
import json
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_tokens import random_tokens
from torch import nn
from turns import answer, median_ratio, take_turns

from gptray.config import Config, ModelConfig
from gptray.model.hf_config import family_of, hf_config
from gptray.model.shape import read_shape
from gptray.training.loop import train_step
from gptray.training.run import start
from gptray.training.workers import Workers

# One training step of a system.
Step = Callable[[], None]
# Runs a job. STEPS: a few steps, giving the mean seconds of one. PEAK: the peak memory in MB.
Timed = Callable[[int], float]
STEPS, PEAK = range(2)


@dataclass(frozen=True)
class Adapted:
    """The rank of an adapter of all linear layers, and the folder of its base model."""

    rank: int
    base: str


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    # Llama only; 0 for a GPT-2.
    n_kv_head: int = 0
    n_inner: int = 0

    @property
    def network(self) -> dict[str, object]:
        """Values of the config's model section."""
        names = ("n_layer", "n_head", "n_embd")
        fields = {name: getattr(self, name) for name in names} | {"n_positions": self.block_size}
        if not self.n_kv_head:
            return fields
        llama: dict[str, object] = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu"}
        llama |= dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), False)
        return fields | llama | {"n_kv_head": self.n_kv_head, "n_inner": self.n_inner}


SHAPES = {
    # nanoGPT's character recipes: for a CPU, and for a GPU with a quarter of its batch
    "a": Shape(4, 4, 128, 64, 12, 65),
    "b16": Shape(6, 6, 384, 256, 16, 65),
    # the quick start
    "quick": Shape(2, 4, 256, 128, 16, 2048),
    # GPT-2 124M with a padded vocabulary
    "c": Shape(12, 12, 768, 256, 4, 50304),
    # configs/llama_small.yaml
    "llama": Shape(2, 4, 128, 128, 16, 2048, n_kv_head=2, n_inner=352),
    # SmolLM2 135M
    "smollm2": Shape(30, 9, 576, 256, 4, 49152, n_kv_head=3, n_inner=1536),
}
SYSTEMS = ("hf-fp32", "hf-bf16", "fp32", "bf16", "ray-bf16")
OF_ADAPTERS = ("hf-peft", "bf16")
OF_BACKENDS = ("bf16:native", "bf16:torch")


def gptray_step(
    shape: Shape, system: str, adapted: Adapted | None, *, compiled: bool, device: torch.device
) -> Step:
    """gptray's own training step, including its batches and dropout seeds."""
    precision, _, backend = system.partition(":")
    network = shape.network
    if adapted:
        network = read_shape(Path(adapted.base)).model_dump() | {"init_from": adapted.base}
    config = Config.model_validate(
        {
            "model": network | {"dropout": 0.0},
            "lora": {"rank": adapted.rank} if adapted else {},
            "train": {
                "global_batch_size": shape.batch_size,
                "block_size": shape.block_size,
                "precision": precision,
                "backend": backend or "auto",
                "compile": compiled,
                "max_steps": 10**9,
            },
        }
    )
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # not earlier: batches are read from it
    run_dir = Path(folder.name)
    data = random_tokens(run_dir / "tokens", shape.vocab_size)
    run = start(config, data, run_dir, workers=Workers.current(), device=device)

    def step() -> None:
        train_step(run)

    return step


def hf_network(shape: Shape) -> Any:
    """transformers' GPT-2 or Llama of a shape, with a tied head and without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = ModelConfig.model_validate(shape.network | {"dropout": 0.0})
    kind = family_of(config)
    fields: Any = hf_config(config, shape.vocab_size, kind, bos_token_id=0, eos_ids=[0])
    auto: Any = AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(**fields, use_cache=False))


def peft_network(adapted: Adapted) -> nn.Module:
    """A frozen bf16 model with PEFT's fp32 adapter."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        adapted.base, dtype=torch.bfloat16, trust_remote_code=False
    )
    lora = peft.LoraConfig(
        r=adapted.rank, lora_alpha=16, use_rslora=True, target_modules="all-linear"
    )
    model: nn.Module = peft.get_peft_model(base, lora)
    return model


def hf_step(shape: Shape, kind: str, adapted: Adapted | None, *, device: torch.device) -> Step:
    """The usual loop around transformers: autocast, gradient clipping, fused AdamW."""
    model = peft_network(adapted) if adapted else hf_network(shape)
    model.to(device).train()
    learns = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-3, fused=True)
    batch = torch.randint(shape.vocab_size, (shape.batch_size, shape.block_size), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind != "fp32"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item(), norm.item()

    return step


def make_step(
    system: str, shape: Shape, adapted: Adapted | None, *, compiled: bool, device: str
) -> Step:
    """Build a system's training step."""
    on = torch.device(device)
    if system.startswith("hf-"):
        return hf_step(shape, system.removeprefix("hf-"), adapted, device=on)
    return gptray_step(shape, system, adapted, compiled=compiled, device=on)


def timed(make: Callable[[], Step], steps: int) -> Timed:
    """Make a step; return the function that runs its jobs."""
    step = make()

    def run(job: int) -> float:
        if job == PEAK:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        step()  # warm-up
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begin) / steps

    return run


def timed_on_ray(make: Callable[[], Step], steps: int) -> Timed:
    """`timed` in a Ray Train worker, with its controller and other actors running.

    Jobs and results go through a socket: an extra actor would add to the overhead being measured.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from gptray.jobs.cluster.connection import ray_cluster

    cluster, threads = ray_cluster(), torch.get_num_threads()
    cluster.__enter__()
    atexit.register(cluster.__exit__, None, None, None)
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()

    def worker() -> None:
        torch.set_num_threads(threads)
        run = timed(make, steps)
        with socket.create_connection(address) as connection, connection.makefile("rw") as turns:
            for job in turns:
                print(run(int(job)), file=turns, flush=True)

    trainer = DataParallelTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": threads}),
        run_config=RunConfig(name="benchmark", storage_path=tempfile.mkdtemp()),
    )
    threading.Thread(target=trainer.fit, daemon=True).start()
    turns = server.accept()[0].makefile("rw")

    def run(job: int) -> float:
        print(job, file=turns, flush=True)
        return float(turns.readline())

    return run


def result(
    shape_name: str,
    shape: Shape,
    seconds: dict[str, list[float]],
    *,
    compiled: bool,
    rounds: int,
) -> dict[str, Any]:
    """Median tokens per second of each system, and ratios of ours to those of HF and Ray."""
    tokens = shape.batch_size * shape.block_size
    return {
        "shape": shape_name,
        "batch": [shape.batch_size, shape.block_size],
        "compile": compiled,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "tokens_per_sec": {
            name: round(tokens / statistics.median(times)) for name, times in seconds.items()
        },
        "ratios": {
            f"{ours}/{theirs}": median_ratio(seconds[ours], seconds[theirs])
            for ours in seconds
            for theirs in seconds
            if "-" in theirs and ours != theirs and not ours.startswith("hf-")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="b16")
    every = dict.fromkeys(SYSTEMS + OF_BACKENDS + OF_ADAPTERS)
    parser.add_argument("--systems", help="of " + " ".join(every))
    parser.add_argument("--compile", action="store_true", help="compile gptray's model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a system per round")
    parser.add_argument("--rank", type=int, help="train an adapter, gptray's and PEFT's")
    parser.add_argument("--batch-size", type=int, help="sequences, in place of the shape's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", choices=every, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, batch_size=args.batch_size or shape.batch_size)
    if args.worker:
        time_it = timed_on_ray if args.worker.startswith("ray-") else timed
        system = args.worker.removeprefix("ray-")
        adapted = Adapted(args.rank, args.base) if args.rank else None
        given = {"compiled": args.compile, "device": args.device}
        answer(lambda: time_it(partial(make_step, system, shape, adapted, **given), args.steps))
        return
    arguments = ["--shape", args.shape, "--steps", str(args.steps), "--device", args.device]
    arguments += ["--batch-size", str(shape.batch_size)]
    arguments += ["--compile"] if args.compile else []
    with tempfile.TemporaryDirectory() as base:
        if args.rank:
            hf_network(shape).save_pretrained(base)
            arguments += ["--rank", str(args.rank), "--base", base]
        systems = OF_ADAPTERS if args.rank else SYSTEMS
        systems = args.systems.split(",") if args.systems else systems
        answers = take_turns(__file__, systems, arguments, [STEPS, PEAK], args.rounds)
    seconds, peaks = answers[STEPS], answers[PEAK]
    summary = result(args.shape, shape, seconds, compiled=args.compile, rounds=args.rounds)
    summary |= {
        "rank": args.rank,
        "peak_mb": {name: round(most[-1]) for name, most in peaks.items()},
    }
    print(f"{'system':24}{'tokens/s':>10}{'peak MB':>10}")
    for name, rate in summary["tokens_per_sec"].items():
        shown = name if name.startswith("hf-") else f"gptray {name}"
        print(f"{shown:24}{rate:>10,}{summary['peak_mb'][name]:>10,}")
    for pair, ratio in summary["ratios"].items():
        print(f"{pair:24}{ratio:>9.2f}x")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
