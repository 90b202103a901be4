"""Finds trained models: in a run, a folder or on the hub. Imports neither torch nor Ray."""

from __future__ import annotations

import logging
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from gptray.commands import typed
from gptray.config import Config, UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.data.tokenizer_files import KINDS, has_tokenizer, tokenizer_files
from gptray.gguf.conversion import SUFFIX, is_gguf, named_as_given
from gptray.model.adapter_folder import adapter_folder
from gptray.model.header import check_weights
from gptray.model.shape import model_folder, read_shape
from gptray.model.usage import Usage
from gptray.storage.driver_lock import is_held
from gptray.storage.files import absolute, expanded, is_uri
from gptray.storage.hub import NotOnHub
from gptray.storage.lease import is_leased
from gptray.storage.remote_folder import RemoteFolder
from gptray.tuning.sweep_record import TRIALS

log = logging.getLogger("gptray")
CONFIG = "config.yaml"
TOKENIZER = "data.tokenizer"
# A folder on this machine or in an object store.
Place: TypeAlias = Path | RemoteFolder
_RUN_MODEL = re.compile(r"[^/.][^/]*/model/config\.json")


def open_model(source: str | Path, *, key: str) -> Path:
    """The folder with the model and its tokenizer that the config's `key` names.

    Raises UserError, which begins with the key, if it is not a usable model with a tokenizer;
    NotOnHub if it is neither a folder nor on the hub.
    """
    try:
        folder = model_folder(source)
        with named_as_given(folder, source):
            check_weights(folder, read_shape(folder))
            Usage.of(folder)
    except NotOnHub:
        raise
    except UserError as error:
        raise UserError(f"{key}: {not_adapter(source, key=key) or error}") from None
    if not tokenizer_files(folder):
        raise UserError(f"{key}: {folder} holds no tokenizer (tokenizer.json)")
    return folder


def not_adapter(source: str | Path, *, key: str) -> str | None:
    """The message for an adapter given as a model; None if `source` is not an adapter."""
    try:
        folder = adapter_folder(source)
    except UserError:
        return None
    section = key.partition(".")[0]
    if section in ("evaluate", "generate"):
        return (
            f"{folder} is an adapter, not a model; {section}.adapter={source} adds it to its base"
        )
    if section == "serve":
        return f"{folder} is an adapter, not a model; serve.adapters={{name: {source}}} serves it"
    return f"{folder} is an adapter, not a model; its run's model/ has it merged in"


def find_model(config: Config, source: str | None, *, key: str) -> tuple[Path, str]:
    """The folder of the model that `source` means as the value of `key`, and its name.

    source: None for the run `name` in `storage_path` or, without a name, the newest run there.
    Raises UserError.
    """
    place = locate(config, source, key=key) if source else own_run(config, key=key)
    try:
        folder = open_model(place, key=key)
    except NotOnHub as error:
        raise unknown(config, place, error.reason, key=key) from None
    rows, asked = read_shape(folder).rows, config.model.vocab_size
    if asked and asked < rows:  # more would be padding, which changes nothing
        _tell(f"model.vocab_size={asked} is for training: {place} keeps its {rows:,} tokens")
    return folder, place


def for_workers(folder: Path, source: str | None) -> str:
    """What workers open as the model: `folder`, or `source` if it is a URI or a GGUF file."""
    if source and is_gguf(expanded(source)):
        return str(absolute(source))
    return source if source and is_uri(source) else str(folder)


def locate(config: Config, source: str, *, key: str) -> str:
    """What `source` means as the value of `key`: the folder of a run, or `source` itself.

    A bare word is the folder of that name here, if it holds what the key needs (a model or, for
    data.tokenizer, a tokenizer); else the run or sweep of that name in `storage_path`; else a hub
    id. Raises UserError for a run that has no model yet, and for an unknown user's home.
    """
    if _is_path(source):
        expanded(source, key=key)
        return source
    holds, what = (has_tokenizer, "tokenizer") if key == TOKENIZER else (has_model, "model")
    here, run = Path(source), all_runs(config) / _composed(source)
    is_trained = has_model(run)
    if not is_trained and not _has(run, CONFIG):
        return source
    if isinstance(run, Path) and holds(here) and here.resolve() != run.resolve():
        word = shlex.quote(f"{key}={run}")
        _tell(f"{key}={source} is the folder {here.absolute()}; {word} is the run")
        return source
    if not is_trained:
        raise UserError(f"{key}={source}: the run {_without_model(run)}")
    if isinstance(run, Path) and here.exists():
        _tell(f"{key}={source} is the run {run}; the folder {here.absolute()} has no {what}")
    return str(run)


def own_run(config: Config, *, key: str) -> str:
    """The run `name` in `storage_path` or, without a name, the newest one. Raises UserError."""
    storage = all_runs(config)
    if config.name is None:
        newest = newest_run(storage)
        if newest is None:
            raise UserError(
                f"{key} is not set and {storage} has no run with a model; name a run, a model "
                "folder or a hub id"
            )
        return str(newest)
    run = storage / config.name
    if has_model(run):
        return str(run)
    if _has(run, CONFIG):
        raise UserError(f"name={config.name}: {_without_model(run)}")
    what_to_do = _nearest_run(storage, config.name) or _how_to_list(storage)
    raise UserError(f"name={config.name}: no such run in {storage}{what_to_do}")


def _without_model(run: Place) -> str:
    """The message for a run without a model, which says when it will have one."""
    is_sweep = _has(run, TRIALS)
    told = f"{run} has no model yet"
    if is_leased(run.files(deep=True)) if isinstance(run, RemoteFolder) else is_held(run):
        when = "when it ends" if is_sweep else "after its first evaluation"
        return f"{told}: it is training, and its best model comes {when}"
    job = "tune" if is_sweep else "train"
    return f"{told}; {typed(job, '--config', f'{run}/{CONFIG}')} resumes it"


def unknown(config: Config, source: str, reason: str, *, key: str) -> UserError:
    """The error for a value of `key` that is found nowhere.

    reason: the answer of the hub or its cache, see `NotOnHub`.
    """
    takes_files = key == TOKENIZER or source.endswith(SUFFIX)
    place = "no such folder or file" if takes_files else "no such folder"
    storage = all_runs(config)
    if _is_path(source):
        path = source.rstrip(os.sep)
        name = os.path.basename(path)
        looked = [f"{place} here" if reason else place]
        what_to_do = _nearest_run(expanded(path).parent, name, prefix=path.removesuffix(name))
    elif has_model(run := storage / _composed(source)):  # only search spaces skip `locate`
        return UserError(
            f"{key}={source}: a search space takes a run's folder, {run}, not its name"
        )
    else:
        looked = [f"no such run in {storage}", f"{place} here"]
        kinds = KINDS if key == TOKENIZER else ()
        what_to_do = _nearest_run(storage, source, kinds) or _how_to_list(storage)
    looked += [reason] if reason else []
    *others, last = looked
    told = f"{', '.join(others)} and {last}" if others else last
    return UserError(f"{key}={source}: {told}{what_to_do}")


def all_runs(config: Config) -> Place:
    """The folder of all runs, here or in an object store. Raises UserError like `storage_of`."""
    remote = is_uri(config.storage_path)
    return RemoteFolder(config.storage_path) if remote else storage_of(config)


def storage_of(config: Config) -> Path:
    """The local folder of all runs. Raises UserError for an unknown user's home."""
    return expanded(config.storage_path, key="storage_path").absolute()


def run_named(config: Config, name: str) -> Path:
    """The folder of a run of this name, in Unicode's composed form, see `checked_name`."""
    return storage_of(config) / _composed(name)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _has(folder: Place, name: str) -> bool:
    """Whether a folder has a file. Raises UserError for a store that cannot be read."""
    if isinstance(folder, RemoteFolder):
        return name in folder.files()
    return (folder / name).is_file()


def has_model(folder: Place) -> bool:
    """Whether a folder is a run with a model or, if local, a model.

    Raises UserError for a store that cannot be read.
    """
    if isinstance(folder, RemoteFolder):
        return _has(folder / "model", "config.json")
    return any((place / "config.json").is_file() for place in (folder, folder / "model"))


def _is_path(source: str) -> bool:
    return os.sep in source or source.startswith(("~", "."))


def _nearest_run(storage: Place, name: str, others: Sequence[str] = (), *, prefix: str = "") -> str:
    """A suggestion of the run, or of one of `others`, with the nearest name; "" if none is near."""
    names = {one.lower(): one for one in (*_names_of_runs(storage), *others)}
    close = nearest(_composed(name).lower(), names)
    return did_you_mean(prefix + names[close] if close else None)


def _how_to_list(storage: Place) -> str:
    """A hint on how to list the runs in a storage path; "" if there are none."""
    if not _names_of_runs(storage):
        return ""
    place = [] if storage == storage_of(Config()) else [f"storage_path={storage}"]
    return f"; {typed('runs', *place)} lists all runs"


def _names_of_runs(storage: Place) -> list[str]:
    if isinstance(storage, RemoteFolder):
        return storage.folders()
    return [config.parent.name for config in storage.glob(f"[!.]*/{CONFIG}")]


@cache
def _tell(message: str) -> None:
    """Log a message only once, since a job looks up its model several times."""
    log.info("%s", message)


def newest_run(storage: Place) -> Place | None:
    """The run with the newest model in a storage path. Raises UserError like `has_model`."""
    if isinstance(storage, RemoteFolder):
        files = storage.files(deep=True).items()
        found = [(one.modified, name) for name, one in files if _RUN_MODEL.fullmatch(name)]
        return storage / max(found)[1].partition("/")[0] if found else None
    models = storage.glob("[!.]*/model/config.json")
    newest = max(models, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parents[1]


def with_tokenizer(config: Config) -> Config:
    """Replace `data.tokenizer` by a run's folder if it is a run's name.

    Raises UserError for a run that has no model yet.
    """
    named = config.data.tokenizer
    if named is None or named in KINDS:
        return config
    data = config.data.model_copy(update={"tokenizer": locate(config, named, key=TOKENIZER)})
    return config.model_copy(update={"data": data})
