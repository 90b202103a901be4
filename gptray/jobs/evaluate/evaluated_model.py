"""Where the model that is to be evaluated lies, and where its results go. No torch, no Ray."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config, UserError
from gptray.config.names import label_of
from gptray.evaluation.result import EVALUATION
from gptray.files import absolute
from gptray.jobs.models import find_model, has_model, newest_run, storage_of, weights_sha256
from gptray.jobs.run_folder import resolve, run_dir
from gptray.training.checkpoint import checkpoint_step
from gptray.tuning.sweep_record import crowned_dir


def model_to_evaluate(config: Config) -> Path:
    """The folder of the model. Raises UserError naming the key."""
    return _trained(find_model(config, _source(config), key="evaluate.model")[0].resolve())


def _source(config: Config) -> str | None:
    """What `evaluate.model` says; by default the run called name (None) or of this config."""
    if config.evaluate.model is not None or config.name is not None:
        return config.evaluate.model
    run = run_dir(resolve(config))
    if not has_model(run):
        newest = newest_run(storage_of(config))
        other = f", such as name={newest.name}" if newest else ""
        raise UserError(
            f"evaluate.model is not set and {run} has no trained model: train it first, or "
            f"name a run, a model folder or a hub id{other}"
        )
    return str(run)


def _trained(model_dir: Path) -> Path:
    """The model in the run that trained it: a sweep's is the copy of its winner's."""
    winner = crowned_dir(model_dir.parent)
    return winner / "model" if winner and model_dir.name == "model" else model_dir


def run_of(model_dir: Path) -> Path | None:
    """The run that a model folder belongs to: its best model's, or a checkpoint's."""
    home = model_dir.parent
    run = home.parent if checkpoint_step(home) is not None else home
    return run if model_dir.name == "model" and (run / "config.yaml").is_file() else None


def results_folder(config: Config, model_dir: Path, run: Path | None) -> Path:
    """Where to keep the results: with the run whose best model it is, else in a new folder.

    Raises UserError where that folder is something else's.
    """
    if run and run / "model" == model_dir:
        return run
    return _own_folder(config, model_dir, run)


def _own_folder(config: Config, model_dir: Path, run: Path | None) -> Path:
    """Where to keep the results of a model that is no run's best one: a folder of its own."""
    storage = absolute(config.storage_path, key="storage_path")
    folder = storage / (config.name or _name(config, model_dir, run))
    visible = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    if visible and ((folder / "config.yaml").exists() or not (folder / EVALUATION).exists()):
        raise UserError(
            f"{folder} exists and is not an evaluation of {model_dir}; choose another name"
        )
    return folder


def _name(config: Config, model_dir: Path, run: Path | None) -> str:
    """A name that this model always gets."""
    source = Path(config.evaluate.model or model_dir)
    label = source.parent.name if source.name == "model" else source.name
    label = f"{run.name}-{label}" if run else label
    label = label_of(label, 40) or "model"
    return f"{label}-{weights_sha256(model_dir)[:6]}"
