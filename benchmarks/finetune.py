"""What fine-tuning gains on a text and loses on another: an adapter, all weights, from scratch.

    python benchmarks/finetune.py MODEL TEXT OTHER [--ways adapter,full,scratch]

MODEL is what model.init_from takes, TEXT what is trained on, OTHER what the model is good at. The
adapter has rank 16 and ten times the learning rate of training all weights; both take 24 steps of 4
x 128 tokens. From scratch, the quick start's model with a vocabulary of 512 takes 500 of 16 x 128.
Prints a table of bits per byte of TEXT's last tenth and of OTHER and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TUNED = [
    "model.n_positions=256", "train.block_size=128", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.max_steps=24", "train.eval_interval=12",
    "optim.warmup_steps=4",
]  # fmt: skip
WAYS = {
    "adapter": [*TUNED, "lora.rank=16", "optim.lr=1e-3", "optim.min_lr=1e-4"],
    "full": [*TUNED, "optim.lr=1e-4", "optim.min_lr=1e-5"],
    "scratch": [
        "data.vocab_size=512", "model.dropout=0.2", "train.max_steps=500", "train.eval_interval=50",
    ],
}  # fmt: skip


def trained(way: str, given: argparse.Namespace, storage: Path) -> dict[str, Any]:
    """The JSON line of a run."""
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *WAYS[way]]
    command += [f"storage_path={storage}", f"name={way}", f"data.source={given.text}"]
    command.append(f"evaluate.also={{other: {given.other}}}")
    if way != "scratch":
        command.append(f"model.init_from={given.model}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "text", "other"):
        parser.add_argument(name)
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda names: names.split(","))
    given = parser.parse_args()
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as storage:
        for way in given.ways:
            result = trained(way, given, Path(storage))
            other = result["also"]["other"]
            if way != "scratch":
                scores["zero-shot"] = {"text": result["base_val_bpb"], "other": other["base_bpb"]}
            scores[way] = {"text": result["val_bpb"], "other": other["bpb"]}
    print(f"{'bits per byte':14} {'text':>6} {'other':>6}")
    for way, of in scores.items():
        print(f"{way:14} {of['text']:6.3f} {of['other']:6.3f}")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
