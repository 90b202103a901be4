"""How many times as much text the recipe for little text is worth.

    python benchmarks/worth.py shakespeare.txt chat.csv builtin [--folder runs/worth] [--quick]

configs/little_text.yaml trains on a quarter of each text: one model, an ensemble of three, and one
model that they teach. The old recipe, cosine with dropout and early stopping, gets an eighth, a
quarter, half and all of it, each with the best of six settings on the first seed (dropout 0, 0.1 or
0.25; all of the steps or a third). A curve through its losses (gptray.tuning.text_curve) tells how
much text it needs to match the recipe's losses, as far as the curve goes. Three seeds each, with
95% intervals.

A whole text is 240,000 characters; 30,000 more, from its end, validate. Of a .csv the first two
columns are read, rows shuffled; builtin is encoded by BPE, all else by characters. A model has two
layers of width 64 and takes at most 3,000 steps of 8 x 64 tokens. Each run has one core, with one
run per core at a time. Results already in FOLDER are kept, so a stopped benchmark resumes.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

from core_pool import run_on_all_cores
from made_tokens import split_tokens, whole_text
from worth_table import show, summary

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "little_text.yaml"
QUARTER = 0.25
SHARED = [
    "model.n_layer=2", "model.n_head=4", "model.n_embd=64", "model.n_positions=64",
    "train.block_size=64", "train.global_batch_size=8", "optim.lr=4e-3", "optim.warmup_steps=60",
]  # fmt: skip
COSINE = ["optim.schedule=cosine", "optim.min_lr=4e-4"]
OLD = {
    f"dropout {dropout}, {1 / part:.0%} of the steps": (dropout, part)
    for dropout, part in product((0.0, 0.1, 0.25), (3, 1))
}
# Config keys on top of the recipe's: none, those that leave one half of it, and possible additions.
WAYS = {
    "recipe": [],
    "landing alone": ["data.token_replacement=0", "model.dropout=0.1"],
    "replacement alone": COSINE,
    "with ema": ["train.ema=0.99"],
    "with more decay": ["optim.weight_decay=0.8", "optim.weight_decay_schedule=falling"],
}


@dataclass(frozen=True)
class Size:
    characters: int = 240_000
    validation: int = 30_000
    steps: int = 3000
    fractions: tuple[float, ...] = (0.125, QUARTER, 0.5, 1.0)
    seeds: tuple[int, ...] = (1, 2, 3)
    eval_interval: int = 100

    @property
    def pupils(self) -> list[int]:
        """Seeds of the pupils, none of them a teacher's."""
        return [seed + len(self.seeds) for seed in self.seeds]


QUICK = Size(12_000, 3000, steps=15, fractions=(QUARTER, 0.5, 1.0), seeds=(1, 2), eval_interval=10)


@dataclass(frozen=True)
class Job:
    """A run, and the key of its result."""

    text: str
    fraction: float
    way: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join(f"{part}" for part in asdict(self).values()).replace(" ", "_")


# Validation losses by job, in nats per token.
Losses = dict[Job, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a file, or builtin")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "worth")
    parser.add_argument("--quick", action="store_true", help="tiny runs with meaningless figures")
    given = parser.parse_args()
    size = QUICK if given.quick else Size()
    folder = given.folder.resolve() / ("quick" if given.quick else "whole")
    texts = [prepare(text, size, folder) for text in given.texts]
    bench = Bench(folder, size)
    bench.run([job for text in texts for job in first_jobs(text, size)])
    bench.run([job for text in texts for job in second_jobs(text, size, bench.losses)])
    found = {}
    for text in texts:
        new = new_losses(text, size, bench.losses) | {"ensemble": [bench.ensemble(text)]}
        found[text] = summary(old_losses(text, size, bench.losses), new, trained_on=QUARTER)
        show(text, found[text])
    print(json.dumps(found))


def prepare(text: str, size: Size, folder: Path) -> str:
    """Write each fraction's tokens, with the same tokenizer and validation; return the name."""
    from gptray.data.tokenizer import char_tokenizer, train_bpe

    name, whole = Path(text).stem, whole_text(text)
    train, val = whole[: size.characters], whole[-size.validation :]
    if len(whole) < size.characters + size.validation:
        raise SystemExit(f"{text} has {len(whole):,} characters, fewer than the benchmark needs")
    tokenizer = train_bpe([train], 512) if text == "builtin" else char_tokenizer(train + val)
    for fraction in size.fractions:
        part = train[: int(fraction * len(train))]
        split_tokens(folder / "tokens" / f"{name}-{fraction}", tokenizer, train=part, val=val)
    return name


def first_jobs(text: str, size: Size) -> list[Job]:
    """The old recipe's settings with the first seed, and all new ways with all seeds."""
    new = [Job(text, QUARTER, way, seed) for way in WAYS for seed in size.seeds]
    return [Job(text, f, way, size.seeds[0]) for f in size.fractions for way in OLD] + new


def second_jobs(text: str, size: Size, losses: Losses) -> list[Job]:
    """The jobs that depend on the first: the best old setting with all seeds, and the pupils."""
    best = [(f, best_old(text, f, size, losses)) for f in size.fractions]
    old = [Job(text, fraction, way, seed) for fraction, way in best for seed in size.seeds]
    return old + [Job(text, QUARTER, "pupil", seed) for seed in size.pupils]


def best_old(text: str, fraction: float, size: Size, losses: Losses) -> str:
    """The setting with the lowest loss on the first seed."""
    return min(OLD, key=lambda way: losses[Job(text, fraction, way, size.seeds[0])])


def old_losses(text: str, size: Size, losses: Losses) -> dict[float, list[float]]:
    """Losses of the best setting, all seeds, by fraction."""
    best = {f: best_old(text, f, size, losses) for f in size.fractions}
    return {f: [losses[Job(text, f, way, seed)] for seed in size.seeds] for f, way in best.items()}


def new_losses(text: str, size: Size, losses: Losses) -> dict[str, list[float]]:
    """Losses of all seeds, by way."""
    seeds = dict.fromkeys(WAYS, list(size.seeds)) | {"pupil": size.pupils}
    return {
        way: [losses[Job(text, QUARTER, way, seed)] for seed in own] for way, own in seeds.items()
    }


class Bench:
    """The runs of a folder and their losses, stored in results.jsonl."""

    def __init__(self, folder: Path, size: Size) -> None:
        self._folder, self._size = folder, size
        self._file = folder / "results.jsonl"
        self.losses: Losses = {}
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.losses[Job(*(row[key] for key in Job.__annotations__))] = row["loss"]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs that have no result yet."""
        new = [job for job in dict.fromkeys(jobs) if job not in self.losses]
        for job, result in run_on_all_cores(
            partial(train, size=self._size, folder=self._folder), new
        ):
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(job) | result) + "\n")
            self.losses[job] = result["loss"]
            print(f"{job.name:50} {result['loss']:.4f}  {result['seconds']:6.0f} s", flush=True)

    def ensemble(self, text: str) -> float:
        """The loss of the ensemble of the recipe's models."""
        import torch

        from gptray.data.scoring import Windows
        from gptray.data.tokens import TokenData
        from gptray.evaluation.metrics import document_ends, losses, sum_windows
        from gptray.model.hf import load_pretrained

        data = TokenData.open(self._folder / "tokens" / f"{text}-{QUARTER}")
        windows = Windows(len(data.val), 64, 64)
        models = [load_pretrained(one).eval() for one in members(text, self._size, self._folder)]
        with torch.inference_mode():
            (sums,) = sum_windows(
                partial(losses, models), data.val, windows, range(len(windows)),
                ends=document_ends(data.val, data.eos_id), batch_size=32, device=models[0].device,
            )  # fmt: skip
        return float(sums.nats.sum() / sums.tokens.sum())


def members(text: str, size: Size, folder: Path) -> list[str]:
    return [str(folder / "models" / Job(text, QUARTER, "recipe", seed).name) for seed in size.seeds]


def train(job: Job, size: Size, folder: Path) -> dict[str, float]:
    """Run one job in its own process; keep the model if it is a teacher."""
    import torch

    from gptray.config import load_config
    from gptray.data.tokens import TokenData
    from gptray.storage.record import read_metrics
    from gptray.training.loop import fit

    began = time.monotonic()
    data = TokenData.open(folder / "tokens" / f"{job.text}-{job.fraction}")
    run_dir, steps = folder / "running" / job.name, size.steps
    keys = [*SHARED, f"seed={job.seed}"]
    if job.way in OLD:
        dropout, part = OLD[job.way]
        steps = size.steps // part
        keys += [*COSINE, f"model.dropout={dropout}"]
    elif job.way == "pupil":
        keys.append(f"train.teachers={json.dumps(members(job.text, size, folder))}")
    else:
        keys += WAYS[job.way]
    keys += [f"train.max_steps={steps}", f"train.eval_interval={size.eval_interval}"]
    config = load_config(None if job.way in OLD else str(RECIPE), keys)
    ended = fit(
        config, data, run_dir,
        report=lambda metrics, checkpoint: None, sample=lambda model: [],
        device=torch.device("cpu"),
    )  # fmt: skip
    if ended["stopped"] not in ("max_steps", "patience"):
        raise SystemExit(f"{job.name}: {ended}")
    loss = min(row["val_loss"] for row in read_metrics(run_dir) if "val_loss" in row)
    if job.way == "recipe":
        shutil.copytree(run_dir / "model", folder / "models" / job.name, dirs_exist_ok=True)
    # Renamed first: a half-removed run could neither resume nor start over.
    ended_dir = run_dir.with_name(f"{run_dir.name}.ended")
    shutil.rmtree(ended_dir, ignore_errors=True)
    shutil.rmtree(run_dir.rename(ended_dir))
    return {"loss": loss, "step": ended["step"], "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
