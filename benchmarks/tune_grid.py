"""Learning curves of a sweep's trials, each run to its own end without rungs and without Ray.

Curves already in the folder are not run again, so a stopped grid resumes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from core_pool import run_on_all_cores
from made_tokens import split_tokens, whole_text

from gptray.config import Config, flatten
from gptray.data.tokens import MANIFEST
from gptray.storage.record import MetricsRow
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import Planned, plan_trials, text_key

OUTCOMES = {"max_steps": "finished", "patience": "patience", "non_finite": "diverged"}


@dataclass(frozen=True)
class Text:
    """A text split into training and validation, and its tokens, in its own folder."""

    name: str
    folder: Path

    @property
    def keys(self) -> list[str]:
        """Config keys that make a job read the same tokens."""
        return [
            f"data.source={self.folder / 'train.txt'}",
            f"data.val_source={self.folder / 'val.txt'}",
            f"data.tokenizer={self.folder / 'tokens' / 'tokenizer'}",
        ]


@dataclass(frozen=True)
class Curve:
    """A trial that ran to its end, and the seconds it took."""

    trial: Trial
    seconds: float


@dataclass(frozen=True)
class Job:
    """A trial to run on a text."""

    text: Text
    planned: Planned

    @property
    def key(self) -> str:
        """A hash, equal for runs that give the same result."""
        config = flatten(self.planned.config) | {"name": "", "storage_path": "", "data.source": ""}
        said = json.dumps([self.text.folder.name, config], sort_keys=True, default=list)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def prepare(source: str, config: Config, folder: Path, *, characters: int) -> Text:
    """Split the first characters of a text and encode them with the config's kind of tokenizer."""
    from gptray.data.tokenizer import char_tokenizer, train_bpe

    whole = whole_text(source)
    if len(whole) < characters:
        raise SystemExit(f"{source} has {len(whole):,} characters, fewer than {characters:,}")
    cut = round(config.data.split[0] * characters)
    train, val = whole[:cut], whole[cut:characters]
    is_char, vocab_size = config.data.tokenizer == "char", config.data.vocab_size
    said = json.dumps([train, val, is_char or vocab_size])
    name = Path(source).stem
    text = Text(name, folder / "texts" / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}")
    if (text.folder / "tokens" / MANIFEST).exists():
        return text
    text.folder.mkdir(parents=True, exist_ok=True)
    for file, part in (("train.txt", train), ("val.txt", val)):
        (text.folder / file).write_text(part, encoding="utf-8", newline="")
    tokenizer = char_tokenizer(train + val) if is_char else train_bpe([train], vocab_size)
    split_tokens(text.folder / "tokens", tokenizer, train=train, val=val)
    return text


def jobs_of(text: Text, config: Config) -> list[Job]:
    """The trials that a sweep of the config would have; all train on the same tokens."""
    trials = plan_trials(config, "grid")
    if len({text_key(planned.config) for planned in trials}) > 1:
        raise SystemExit(
            "trials that differ in data.* need a text each; leave data.* out of the space"
        )
    return [Job(text, planned) for planned in trials]


class Grids:
    """The curves of a folder, stored in curves.jsonl."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, folder / "curves.jsonl"
        self._rows: dict[str, Mapping[str, object]] = {}
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[row["key"]] = row

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that have no curve yet, one per core at a time."""
        new = [job for job in jobs if job.key not in self._rows]
        ended = run_on_all_cores(partial(train, folder=self._folder), new)
        for number, (job, row) in enumerate(ended, start=1):
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=list) + "\n")
            self._rows[job.key] = row
            name = f"{job.text.name} {job.planned.config.seed} {job.planned.name}"
            print(f"{number:3} of {len(new)}  {name:32} {row['seconds']:6} s", flush=True)

    def curves(self, jobs: Sequence[Job]) -> list[Curve]:
        """The curves of jobs that have run."""
        return [_curve(job.planned, self._rows[job.key]) for job in jobs]


def _curve(planned: Planned, row: Mapping[str, object]) -> Curve:
    rows = cast(list[MetricsRow], row["rows"])
    trial = Trial(
        planned.name, planned.values, planned.config.train.max_steps, None,
        str(row["outcome"]), True, cast(int, row["step"]), None, rows,
    )  # fmt: skip
    return Curve(trial, cast(float, row["seconds"]))


def train(job: Job, folder: Path) -> dict[str, object]:
    """Run one trial in its own process; return its row of curves.jsonl."""
    import torch

    from gptray.data.tokens import TokenData
    from gptray.storage.record import read_metrics
    from gptray.training.loop import fit

    began, planned = time.monotonic(), job.planned
    run_dir = folder / "running" / job.key
    shutil.rmtree(run_dir, ignore_errors=True)  # a resumed run would report too few seconds
    ended = fit(
        planned.config, TokenData.open(job.text.folder / "tokens"), run_dir,
        report=lambda metrics, checkpoint: None, sample=lambda model: [],
        device=torch.device("cpu"),
    )  # fmt: skip
    if ended["stopped"] not in OUTCOMES:
        raise SystemExit(f"{job.text.name}, trial {planned.name}: {ended}")
    kept = ("step", "phase", "val_bpb", "val_loss", "val_loss_own", "val_loss_ema", "gap")
    rows = [
        {name: value for name, value in row.items() if name in kept}
        for row in read_metrics(run_dir)
        if "val_bpb" in row
    ]
    shutil.rmtree(run_dir)
    return {
        "key": job.key,
        "text": job.text.name,
        "seed": planned.config.seed,
        "trial": planned.name,
        "values": planned.values,
        "outcome": OUTCOMES[ended["stopped"]],
        "step": ended["step"],
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }
