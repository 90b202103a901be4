"""Tokens per second of gptray's training step against a plain loop over transformers' network.

Shapes are of GPT-2 and of Llama. All systems take turns on the same shape and batch, each in a
process of its own; ratios are medians over rounds.

    python benchmarks/train.py [--shape c] [--compile] [--systems hf-fp32,hf-bf16,bf16]

ray-bf16 is the step in a Ray Train worker: its ratio to bf16 is what Ray costs. bf16 trains with
what train.backend=auto chooses; bf16:native and bf16:torch name the backend.
"""

from __future__ import annotations

import argparse
import atexit
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from made_tokens import random_tokens
from torch import nn
from turns import answer, median_ratio, take_turns

from gptray.config import Config
from gptray.training.loop import train_step
from gptray.training.run import start
from gptray.training.workers import Workers

# What one system does in a step, in the order of its training.
Step = Callable[[], None]
# Runs a few steps and returns the mean seconds of one.
Timed = Callable[[int], float]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    # Of a Llama; 0: GPT-2.
    n_kv_head: int = 0
    n_inner: int = 0

    @property
    def network(self) -> dict[str, object]:
        """Fields of the section model."""
        names = ("n_layer", "n_head", "n_embd")
        fields = {name: getattr(self, name) for name in names} | {"n_positions": self.block_size}
        if not self.n_kv_head:
            return fields
        llama: dict[str, object] = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu"}
        llama |= dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), False)
        return fields | llama | {"n_kv_head": self.n_kv_head, "n_inner": self.n_inner}


SHAPES = {
    # nanoGPT's recipe for a CPU, and for characters on a GPU with a quarter of its batch
    "a": Shape(4, 4, 128, 64, 12, 65),
    "b16": Shape(6, 6, 384, 256, 16, 65),
    # the quick start
    "quick": Shape(2, 4, 256, 128, 16, 2048),
    # GPT-2 124M, its vocabulary padded
    "c": Shape(12, 12, 768, 256, 4, 50304),
    # configs/llama_small.yaml
    "llama": Shape(2, 4, 128, 128, 16, 2048, n_kv_head=2, n_inner=352),
    # SmolLM2 135M
    "smollm2": Shape(30, 9, 576, 256, 4, 49152, n_kv_head=3, n_inner=1536),
}
SYSTEMS = ("hf-fp32", "hf-bf16", "fp32", "bf16", "ray-bf16")
OF_BACKENDS = ("bf16:native", "bf16:torch")


def gptray_step(shape: Shape, system: str, *, compiled: bool, device: torch.device) -> Step:
    """gptray's own training step, batches and dropout seeds included."""
    precision, _, backend = system.partition(":")
    config = Config.model_validate(
        {
            "model": shape.network | {"dropout": 0.0},
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
    atexit.register(folder.cleanup)  # batches are read from it
    run_dir = Path(folder.name)
    data = random_tokens(run_dir / "tokens", shape.vocab_size)
    run = start(config, data, run_dir, workers=Workers.current(), device=device)

    def step() -> None:
        train_step(run)

    return step


def hf_gpt2(n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int) -> nn.Module:
    """transformers' GPT-2 without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def hf_llama(shape: Shape) -> nn.Module:
    """transformers' Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_kv_head,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_inner,
        max_position_embeddings=shape.block_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def hf_step(shape: Shape, precision: str, *, device: torch.device) -> Step:
    """The step that people write around transformers: autocast, clipping, fused AdamW."""
    fields = shape.n_layer, shape.n_head, shape.n_embd, shape.block_size, shape.vocab_size
    model = hf_llama(shape) if shape.n_kv_head else hf_gpt2(*fields)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = torch.randint(shape.vocab_size, (shape.batch_size, shape.block_size), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item(), norm.item()

    return step


def timed(system: str, shape: Shape, steps: int, *, compiled: bool, device: str) -> Timed:
    """Make a system; the function runs it and returns the mean seconds of a step."""
    if system.startswith("hf-"):
        step = hf_step(shape, system.removeprefix("hf-"), device=torch.device(device))
    else:
        step = gptray_step(shape, system, compiled=compiled, device=torch.device(device))

    def run(job: int) -> float:
        step()  # finds cold caches
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begin) / steps

    return run


def timed_on_ray(system: str, shape: Shape, steps: int, *, compiled: bool, device: str) -> Timed:
    """The same in a Ray Train worker, with the controller and all that looks after it.

    Turns and times go through a socket: any actor more would cost what is to be measured.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from gptray.jobs.cluster import ray_cluster

    cluster, threads = ray_cluster(), torch.get_num_threads()
    cluster.__enter__()
    atexit.register(cluster.__exit__, None, None, None)
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()

    def worker() -> None:
        torch.set_num_threads(threads)
        run = timed(system, shape, steps, compiled=compiled, device=device)
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
    shape_name: str, seconds: dict[str, list[float]], *, compiled: bool, rounds: int
) -> dict[str, Any]:
    """Tokens per second (medians) of each system and the ratio of ours to each of HF's."""
    shape = SHAPES[shape_name]
    tokens = shape.batch_size * shape.block_size
    return {
        "shape": shape_name,
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
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="of " + " ".join(SYSTEMS))
    parser.add_argument("--compile", action="store_true", help="compile gptray's model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a system per round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", choices=SYSTEMS + OF_BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        make = timed_on_ray if args.worker.startswith("ray-") else timed
        system, shape = args.worker.removeprefix("ray-"), SHAPES[args.shape]
        answer(lambda: make(system, shape, args.steps, compiled=args.compile, device=args.device))
        return
    arguments = ["--shape", args.shape, "--steps", str(args.steps), "--device", args.device]
    arguments += ["--compile"] if args.compile else []
    seconds = take_turns(__file__, args.systems.split(","), arguments, [0], args.rounds)[0]
    summary = result(args.shape, seconds, compiled=args.compile, rounds=args.rounds)
    print(f"{'system':24}{'tokens/s':>10}")
    for name, rate in summary["tokens_per_sec"].items():
        print(f"{name if name.startswith('hf-') else 'gptray ' + name:24}{rate:>10,}")
    for pair, ratio in summary["ratios"].items():
        print(f"{pair:24}{ratio:>9.2f}x")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
