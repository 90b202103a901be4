"""The models to evaluate: where they are, which may be averaged, and where the results go.

Imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gptray.config import Config, UserError, load_config
from gptray.config.names import slug
from gptray.data.tokenizer import Tokenizer
from gptray.evaluation.result import EVALUATION
from gptray.jobs.adapters import adapter_sha256, name_with
from gptray.jobs.folders.fetching import fetch_records, records_folder
from gptray.jobs.folders.places import held_out, run_of, with_absolute_paths
from gptray.jobs.folders.run_folder import resolve, run_place
from gptray.jobs.models import CONFIG, all_runs, find_model, has_model, newest_run
from gptray.model.shape import model_folder, read_shape, weights_sha256
from gptray.storage.files import absolute, is_uri
from gptray.storage.node_cache import hold
from gptray.storage.remote_folder import RemoteFolder
from gptray.tuning.sweep_record import published_dir


@dataclass(frozen=True)
class FoundModel:
    """A model to evaluate, in a local folder. place: its name as given, or its URI.

    run: the run whose best model or checkpoint it is; None for other models. home: of a run whose
    storage is an object store; then `run` has only its records.
    """

    folder: Path
    place: str
    run: Path | None
    home: RemoteFolder | None = None


def models_to_evaluate(config: Config) -> list[FoundModel]:
    """Find the model, or each of several. Raises UserError naming the key."""
    named = config.evaluate.model
    return [_found(config, one) for one in (named if isinstance(named, list) else [named])]


def _found(config: Config, named: str | None) -> FoundModel:
    folder, place = find_model(config, named or _default(config), key="evaluate.model")
    storage = config.storage_path.rstrip("/")
    if is_uri(storage) and place.startswith(f"{storage}/"):
        return _in_store(folder, RemoteFolder(place.removesuffix("/model")))
    folder = _trained(folder.resolve())
    return FoundModel(folder, place, run_of(folder))


def _default(config: Config) -> str | None:
    """The model if none is given: None if a run is named, else the run with this config."""
    if config.name is not None:
        return None
    resolved = resolve(config)
    run = run_place(resolved)
    if not has_model(RemoteFolder(run) if is_uri(run) else Path(run)):
        newest = newest_run(all_runs(config))
        other = f", such as name={newest.name}" if newest else ""
        raise UserError(
            f"evaluate.model is not set and {run} has no trained model: train it first, or "
            f"name a run, a model folder or a hub id{other}"
        )
    return run


def _in_store(folder: Path, home: RemoteFolder) -> FoundModel:
    """The model of a folder in the object store at storage_path; for a sweep, its winner's."""
    names = home.files(deep=True)
    if CONFIG not in names:
        return FoundModel(folder, str(home), None)
    records = records_folder(home)
    hold(records.parent)
    fetch_records(home, names, records)
    if winner := published_dir(records):
        trial = home / "trials" / winner.name
        return _in_store(model_folder(str(trial)), trial)
    return FoundModel(folder, str(home), records, home)


def _trained(model_dir: Path) -> Path:
    """The model in the run that trained it: a sweep's model is a copy of its winner's."""
    winner = published_dir(model_dir.parent)
    return winner / "model" if winner and model_dir.name == "model" else model_dir


def results_folder(
    config: Config, models: Sequence[FoundModel]
) -> tuple[Path, RemoteFolder | None]:
    """Where the results go: to the run if it is its best model, otherwise to a new folder.

    Also where that is published, if storage_path is an object store.
    Raises UserError if the folder belongs to something else.
    """
    found = models[0]
    kind = config.quantize.weights
    is_own = len(models) == 1 and config.evaluate.adapter is None and kind == "none"
    if is_own and found.run and (found.home or found.run / "model" == found.folder):
        return found.run, found.home
    # If no model is given, `name` is the run to evaluate.
    name = (config.evaluate.model and config.name) or _name(config, models)
    if is_uri(config.storage_path):
        home = RemoteFolder(config.storage_path) / name
        _check_own(str(home), models, home.files())
        return records_folder(home), home
    folder = absolute(config.storage_path, key="storage_path") / name
    visible = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    _check_own(str(folder), models, [name for name in visible if name[0] != "."])
    return folder, None


def _check_own(folder: str, models: Sequence[FoundModel], names: Collection[str]) -> None:
    """Raise UserError for a folder with files other than those of an evaluation."""
    if names and (CONFIG in names or EVALUATION not in names):
        what = " and ".join(str(found.folder) for found in models)
        raise UserError(f"{folder} exists and is not an evaluation of {what}; choose another name")


def _name(config: Config, models: Sequence[FoundModel]) -> str:
    """A name for the results that is always the same for the same models."""
    found, *others = models
    source = Path(found.place)
    label = source.parent.name if source.name == "model" else source.name
    label = f"{found.run.name}-{label}" if found.run else label
    label = name_with(label, config.evaluate.adapter).replace(":", "-")
    if others:
        label = f"ensemble-of-{len(models)}"
    if config.quantize.weights != "none":
        label = f"{label}-{config.quantize.weights}"
    digest = adapter_sha256(config.evaluate.adapter) or sha256_of_models(models)
    return f"{slug(label, 40) or 'model'}-{digest[:6]}"


def sha256_of_models(models: Sequence[FoundModel]) -> str:
    """The sha256 of the weights or, for several models, of all their sha256s."""
    every = [weights_sha256(found.folder) for found in models]
    return every[0] if len(every) == 1 else sha256("".join(every).encode()).hexdigest()


def check_goes_with(
    first: FoundModel, other: FoundModel, block_size: int, *, own_text: Config | None
) -> None:
    """Raise UserError for a model whose probabilities cannot be averaged with the first one's.

    block_size: tokens of a window. own_text: the config of the first one's training text, if that
    is scored.
    """
    if Tokenizer.load(other.folder).sha256 != Tokenizer.load(first.folder).sha256:
        raise UserError(
            f"evaluate.model: {first.folder} and {other.folder} have different tokenizers; only "
            "models with the same one can be averaged"
        )
    n_positions = read_shape(other.folder).n_positions
    if n_positions < block_size:
        raise UserError(
            f"evaluate.model: {other.folder} has {n_positions} positions, fewer than the "
            f"{block_size} tokens of a window; set train.block_size={n_positions}"
        )
    if own_text is None or other.run is None:
        return
    trained = with_absolute_paths(load_config(str(other.run / CONFIG), []))
    if held_out(trained) != held_out(own_text):
        raise UserError(
            f"evaluate.model: {other.run} was trained on another text or split than {first.run}, "
            "so it may have seen this validation text; score text that none has seen with "
            "evaluate.source=..., or train with data.seed=1, which gives runs of any seed the "
            "same split"
        )
