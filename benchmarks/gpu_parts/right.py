"""Do runs repeat bit for bit, and do rows keep their text in any batch and on any device?"""

from __future__ import annotations

from collections import abc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.bench import Bench
from gpu_parts.generate import engine_of
from made_tokens import text_tokens

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.jobs.train.samples import sample_texts
from gptray.storage.files import sha256_of
from gptray.storage.record import read_metrics
from gptray.training.loop import fit

CPU = torch.device("cpu")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 40, "temperature": 0.8},
    "top_p": {"top_p": 0.9},
    "all": {},
}


class Interrupted(Exception):
    """Simulates whatever interrupts a run."""


def right(bench: Bench) -> None:
    data = TokenData.open(bench.data) if bench.data else text_tokens(bench.scratch / "text")
    exact = {"deterministic": True}
    same_bits(bench, data, "fp32", {"precision": "fp32", "compile": False, **exact})
    if bench.on_gpu:
        bf16 = {"precision": "bf16", "compile": False}
        same_bits(bench, data, "bf16", {**bf16, **exact})
        same_bits(bench, data, "bf16 compiled", {**bf16, "compile": True, **exact})
        fast = {**bf16, "compile": True, "deterministic": False}
        same_bits(bench, data, "bf16 compiled, not deterministic", fast)
    if bench.on_gpu:
        same_losses(bench, data)
    same_rows(bench, bench.scratch / "right: fp32" / "model", data.vocab_size)


def same_bits(bench: Bench, data: TokenData, kind: str, keys: dict[str, Any]) -> None:
    """Train twice, and once with an interruption."""
    once, again, resumed = (
        trained(bench, data, f"right: {kind}{how}", keys, stop=bool(stop))
        for how, stop in (("", False), (", again", False), (", resumed", True))
    )
    same = {"twice": once == again, "resumed": once == resumed}
    bench.keep(f"right: same bits, {kind}", same)
    bench.say(f"right: same bits, {kind}: twice {same['twice']}, resumed {same['resumed']}")


def same_losses(bench: Bench, data: TokenData) -> None:
    """Train on the GPU and on the CPU, without dropout, since masks would differ."""
    keys = {"precision": "fp32", "compile": False}
    trained(bench, data, "right: fp32, no dropout", keys, dropout=0.0)
    trained(bench, data, "right: fp32, no dropout, CPU", keys, dropout=0.0, device=CPU)


def trained(
    bench: Bench,
    data: TokenData,
    name: str,
    keys: dict[str, Any],
    *,
    dropout: float = 0.1,
    stop: bool = False,
    device: torch.device | None = None,
) -> str:
    """Train a run with `fit`, and return its model's sha256.

    stop: interrupt it after half its steps and resume it.
    """
    device, folder, begin = device or bench.device, bench.scratch / name, bench.clock()
    config = small(bench, keys, dropout=dropout, on_gpu=device.type == "cuda")
    half = config.train.max_steps // 2
    interrupt_at = [half] if stop else []

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if metrics["step"] in interrupt_at:
            interrupt_at.clear()
            raise Interrupted

    def run() -> dict[str, Any]:
        return fit(
            config,
            data,
            folder,
            report=report,
            sample=lambda model: sample_texts(config, data, model),
            device=device,
        )

    try:
        row = run()
    except Interrupted:
        row = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert row["stopped"] == "max_steps" and not interrupt_at, row
    val_loss = read_metrics(folder)[-1]["val_loss"]
    digest, seconds = sha256_of(folder / "model" / "model.safetensors"), bench.clock() - begin
    bench.keep(name, {"val_loss": val_loss, "sha256": digest, "seconds": round(seconds, 2)})
    bench.say(f"{name:50} val_loss {val_loss:.5f}  {digest[:12]}  {seconds:5.1f} s")
    return digest


def small(bench: Bench, keys: dict[str, Any], *, dropout: float, on_gpu: bool) -> Config:
    steps, block_size = (4, 32) if bench.tiny else (40, 128)
    n_embd = 32 if bench.tiny else 256
    return Config.model_validate(
        {
            "model": {
                "n_layer": 2,
                "n_head": 4,
                "n_embd": n_embd,
                "n_positions": block_size,
                "dropout": dropout,
            },
            "train": {
                "max_steps": steps,
                "eval_interval": steps // 4,
                "log_interval": 1,
                "block_size": block_size,
                "global_batch_size": 16,
                "micro_batch_size": 8,
                "backend": "torch",
                "patience": None,
                **keys,
            },
            "sample": {"max_new_tokens": 8},
            "compute": {"use_gpu": on_gpu},
        }
    )


def same_rows(bench: Bench, folder: Path, vocab_size: int) -> None:
    """The share of rows with the same tokens alone and in a batch, and on GPU and CPU in fp32."""
    count = 4 if bench.tiny else 24
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 20 if bench.tiny else 40, size=count).tolist()
    prompts = [rng.integers(vocab_size, size=length).tolist() for length in lengths]
    together: list[list[int]] = []
    for precision in ("bf16", "fp32"):
        alone = outputs(bench, folder, precision, prompts, batch=1)
        together = outputs(bench, folder, precision, prompts, batch=count)
        tell_equal(bench, f"alone and in a batch of {count}, {precision}", alone, together)
    if bench.on_gpu:
        there = Bench(CPU, tiny=bench.tiny, scratch=bench.scratch)
        on_cpu = outputs(there, folder, "fp32", prompts, batch=count)
        tell_equal(bench, "on GPU and CPU, fp32", together, on_cpu)


def outputs(
    bench: Bench, folder: Path, precision: str, prompts: abc.Sequence[list[int]], *, batch: int
) -> list[list[int]]:
    """The new tokens of every prompt, for each of WAYS in turn."""
    engine = engine_of(bench, folder, batch, precision=precision)
    new_tokens = 4 if bench.tiny else 16
    return [
        generation.tokens
        for settings in WAYS.values()
        for generation in engine.run(
            [
                Sequence(ids, Sampling(max_new_tokens=new_tokens, seed=seed, **settings))
                for seed, ids in enumerate(prompts)
            ]
        )
    ]


def tell_equal(bench: Bench, what: str, ones: list[list[int]], others: list[list[int]]) -> None:
    """Report the share of equal rows for each way of sampling."""
    each = len(ones) // len(WAYS)
    equal = [one == other for one, other in zip(ones, others, strict=True)]
    shares = {
        way: round(sum(equal[i * each : (i + 1) * each]) / each, 3) for i, way in enumerate(WAYS)
    }
    bench.keep(f"right: equal rows, {what}", shares)
    words = ", ".join(f"{way} {share:g}" for way, share in shares.items())
    bench.say(f"right: equal rows {what}: {words}")
