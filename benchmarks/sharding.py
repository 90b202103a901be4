"""Peak memory of a worker under ddp and fsdp: GPT-2 124M on two CPU workers, in one run.

Measured after training, and again after an evaluation (validation, checkpoint, samples). The batch
is small, so that weights and optimizer state dominate.

    python benchmarks/sharding.py [--precision fp32] [--block-size 64] [--steps 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from made_tokens import random_tokens
from tiny import free_port
from torch.multiprocessing.spawn import spawn

from gptray.config import Config, load_config
from gptray.data.tokens import TokenData
from gptray.jobs.train.samples import sample_texts
from gptray.training.evaluations import BlockingEvaluation
from gptray.training.journal import Journal
from gptray.training.loop import step_row, train_step
from gptray.training.run import start
from gptray.training.workers import Workers

WORKERS = 2
SYSTEMS = {
    "ddp": ["compute.strategy=ddp"],
    "fsdp": ["compute.strategy=fsdp"],
    "fsdp, blocks computed again": ["compute.strategy=fsdp", "model.checkpoint_blocks=true"],
}
VOCAB_SIZE = 50304


def config_of(system: str, arguments: argparse.Namespace) -> Config:
    return load_config(
        None,
        [
            "model.n_layer=12",
            "model.n_head=12",
            "model.n_embd=768",
            f"model.n_positions={arguments.block_size}",
            f"train.block_size={arguments.block_size}",
            f"train.global_batch_size={WORKERS}",
            f"train.precision={arguments.precision}",
            f"compute.num_workers={WORKERS}",
            "sample.max_new_tokens=8",
            *SYSTEMS[system],
        ],
    )


def worker(rank: int, config: Config, data_dir: Path, folder: Path, port: int, steps: int) -> None:
    torch.set_num_threads(1)
    method = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORKERS)
    data, device = TokenData.open(data_dir), torch.device("cpu")
    run = start(config, data, folder, workers=Workers.current(), device=device)
    numbers = [train_step(run).read()[:2] for _ in range(steps)]
    training = peak()
    row = step_row(run, [loss for loss, _ in numbers], 0.0, grad_norm=numbers[-1][1], lr=0.0)
    sample = partial(sample_texts, config, data)
    if rank:
        BlockingEvaluation(run, lambda *_: None, sample).add(row)
    else:
        with Journal(folder, step=0) as run.journal:
            BlockingEvaluation(run, lambda *_: None, sample).add(row)
    found = {"training": training, "evaluated": peak(), "losses": [loss for loss, _ in numbers]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


def peak() -> float:
    """Peak resident memory of this process in GiB; Linux reports KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        data = random_tokens(Path(root) / "tokens", VOCAB_SIZE, tokens=20_000)
        for number, system in enumerate(SYSTEMS):
            config, folder = config_of(system, arguments), Path(root) / str(number)
            folder.mkdir()
            given = (config, data.data_dir, folder, free_port(), arguments.steps)
            spawn(worker, given, nprocs=WORKERS)  # type: ignore[no-untyped-call]
            files = [folder / f"rank-{rank}.json" for rank in range(WORKERS)]
            found = [json.loads(file.read_text("utf-8")) for file in files]
            result[system] = {
                key: round(max(one[key] for one in found), 3) for key in ("training", "evaluated")
            }
            print(f"{system:30} {result[system]}  losses {found[0]['losses']}", flush=True)
    ddp = result["ddp"]
    for system, gib in result.items():
        gib |= {f"{key}_to_ddp": round(gib[key] / ddp[key], 3) for key in tuple(gib)}
        print(f"{system:30} " + "  ".join(f"{key} {value}" for key, value in gib.items()))
    print(json.dumps({"peak_gib": result}))


if __name__ == "__main__":
    main()
