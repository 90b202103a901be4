"""A run that was interrupted, and what `jobs/train.py` does with it, its loop in this process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gptray.config import Config, RunFailed, UserError
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import outcome, resolve, set_ray_snapshot_aside
from gptray.jobs.train.check import check
from gptray.jobs.train.watch import show_end, watching
from gptray.storage.driver_lock import held
from gptray.storage.files import sha256_of
from gptray.storage.record import read_rows
from gptray.training.loop import fit
from tests.damage import Damage, fields
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]
STEPS = 6
NEW, OLD = "checkpoint_000004", "checkpoint_000002"
MANIFEST, TRAINER, MOMENTS = f"{NEW}/manifest.json", "trainer.json", "optimizer.safetensors"
WEIGHTS = "model/model.safetensors"
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Killed(BaseException):
    """Ends a run where a kill would."""


def config_in(storage: Path) -> Config:
    source = storage.parent / "tiny.txt"
    return resolve(
        tiny_config(
            source, storage, "name=r", f"train.max_steps={STEPS}", "train.eval_interval=2",
            "train.log_interval=1", "compute.num_to_keep=3",
        )
    )  # fmt: skip


def job(config: Config, *, kill_at: int | None = None) -> dict[str, Any]:
    """Train or resume, as the job does."""
    checked = check(config)
    folder, data = checked.folder, checked.text.data
    assert data

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if metrics["step"] == kill_at:
            raise Killed

    with held(folder):
        save_config(checked.config, folder)
        set_ray_snapshot_aside(folder)
        with watching(folder, STEPS, on_evaluation=lambda: None):
            result = fit(
                checked.config, data, folder, report=report, sample=lambda model: [("p", "o")],
                device=torch.device("cpu"),
            )  # fmt: skip
        show_end(folder)
    if result["stopped"] == "failed":
        raise (UserError if result["mistake"] else RunFailed)(result["message"])
    if result["stopped"] == "non_finite":
        raise RunFailed(result["message"])
    return outcome(checked.config)


def dies(code: str) -> None:
    """Run code that has its process end as by SIGKILL, with threads and `Path` as they are here."""
    begin = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
    begin += "from pathlib import Path\n"
    died = subprocess.run([sys.executable, "-c", begin + code], cwd=ROOT, timeout=400)
    assert died.returncode == 9


def what_it_came_to(folder: Path) -> tuple[str, list[tuple[int, float]]]:
    """The bits of the last checkpoint and of the model, and all losses."""
    digest = hashlib.sha256()
    last = folder / f"checkpoint_{STEPS:06d}"
    for path in (last / WEIGHTS, last / MOMENTS, folder / WEIGHTS):
        digest.update(path.read_bytes())
    return digest.hexdigest(), [
        (row["step"], row["train_loss"]) for row in read_rows(folder / METRICS)
    ]


def signed(damage: Damage) -> Damage:
    """Damage the newest checkpoint, and make its manifest right again."""

    def both(folder: Path) -> None:
        checkpoint = folder / NEW
        damage(checkpoint)
        paths = [path for path in checkpoint.rglob("*") if path.is_file()]
        files = {
            path.relative_to(checkpoint).as_posix(): {
                "size": path.stat().st_size, "sha256": sha256_of(path)
            }
            for path in paths if path.name != "manifest.json"
        }  # fmt: skip
        content = json.dumps({"format": 1, "files": files})
        (checkpoint / "manifest.json").write_text(content)

    return both


def progress(**values: Any) -> Damage:
    """Set or, by `...`, remove what trainer.json says of the progress."""

    def damage(folder: Path) -> None:
        known = json.loads((folder / TRAINER).read_text())["progress"] | values
        kept = {key: value for key, value in known.items() if value is not ...}
        fields(TRAINER, progress=kept)(folder)

    return damage


def moments(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda folder: save_file(change(load_file(folder / MOMENTS)), folder / MOMENTS)


def not_finite(folder: Path) -> None:
    tensors = {name: one * float("nan") for name, one in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
