"""Paths of a run and its text: keeps the two apart, and makes paths absolute.

No torch, no Ray.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptray.config import Config, UserError, flatten, load_saved
from gptray.config.named_texts import named_texts
from gptray.data.chats import TEXT
from gptray.data.sources import BUILTIN
from gptray.data.tokenizer_files import KINDS
from gptray.jobs.models import CONFIG
from gptray.storage.files import absolute, check_writable, expanded
from gptray.storage.node_cache import storage_folder
from gptray.training.checkpoint import checkpoint_step

_DATA_SOURCES = ("data.source", "data.val_source", "data.test_source")
# Keys whose values are paths.
SOURCES = (*_DATA_SOURCES, "evaluate.also")
# Keys that decide which text is held out, besides the seed of the split.
_HOLD_OUT = ("source", "val_source", "test_source", "text_column", "separator", "encoding", "split")


def with_absolute_paths(config: Config) -> Config:
    """The config with absolute paths of its text and tokenizer.

    In a job that was submitted to a cluster they stay relative: its folder is a temporary copy.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return config
    data = config.data
    changed: dict[str, object] = {}
    for key in _DATA_SOURCES:
        name = key.removeprefix("data.")
        value = getattr(data, name)
        if value is not None and (path := _absolute(value, key=key)) != value:
            changed[name] = path
    tokenizer = data.tokenizer
    if tokenizer and tokenizer not in KINDS and expanded(tokenizer).exists():
        changed["tokenizer"] = _absolute(tokenizer)
    also = {
        name: _absolute(source, key="evaluate.also")
        for name, source in named_texts(config.evaluate.also).items()
    }
    evaluate = config.evaluate.model_copy(update={"also": also}) if also else config.evaluate
    return config.model_copy(update={"data": data.model_copy(update=changed), "evaluate": evaluate})


def is_same_place(before: object, now: object) -> bool:
    """Whether two values of a path key may mean the same text or tokenizer.

    A relative path may be the same as one that ends with it: the folder may have been moved, and
    the text's tokens are compared anyway.
    """
    if isinstance(before, str) and isinstance(now, str):
        ends = not os.path.isabs(now) and before.endswith(os.sep + os.path.normpath(now))
        return ends or _absolute(before) == _absolute(now)
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.keys() == now.keys():
        return all(is_same_place(before[name], now[name]) for name in before)
    if isinstance(before, Sequence) and isinstance(now, Sequence) and len(before) == len(now):
        return all(map(is_same_place, before, now))
    return bool(before == now)


def run_of(model_dir: Path) -> Path | None:
    """The run that a model folder belongs to: its best model's, or a checkpoint's."""
    home = model_dir.parent
    run = home.parent if checkpoint_step(home) is not None else home
    return run if model_dir.name == "model" and (run / CONFIG).is_file() else None


def held_out(config: Config) -> dict[str, object]:
    """The values, by key, that decide which text a run holds out; its paths must be absolute."""
    flat = flatten(config)
    seed = config.seed if config.data.seed is None else config.data.seed
    held = {"seed": seed, **{key: flat[f"data.{key}"] for key in _HOLD_OUT}}
    return held | ({"text_column": TEXT} if held["text_column"] is None else {})


def arguments_for(folder: Path) -> list[str]:
    """The extra arguments of a command with a run's saved config, if the run has been moved."""
    if not (folder / CONFIG).is_file():
        return []
    saved = load_saved(folder / CONFIG)
    storage = storage_folder(saved.storage_path)
    if saved.name and (storage / saved.name).resolve() == folder.resolve():
        return []
    return [f"name={folder.name}", f"storage_path={folder.parent}"]


def _absolute(source: str | list[str], *, key: str | None = None) -> str | list[str]:
    if isinstance(source, str):
        is_path = source != BUILTIN and "://" not in source
        return str(absolute(source, key=key)) if is_path else source
    return [one if "://" in one else str(absolute(one, key=key)) for one in source]


def check_storage(config: Config) -> None:
    """Raise UserError for a storage_path that is not writable, or that a source would read."""
    storage = storage_folder(config.storage_path)
    folder = storage / config.name if config.name else storage
    for key, sources in (
        ("data.source", config.data.source),
        ("evaluate.source", config.evaluate.source or []),
        ("evaluate.also", list(named_texts(config.evaluate.also).values())),
    ):
        for source in [sources] if isinstance(sources, str) else sources:
            if "://" not in source and _reads(source, folder, key=key):
                raise UserError(
                    f"storage_path={config.storage_path}: {folder} lies in {key}={source}, so "
                    "the job's own files would become training text; choose a folder outside of "
                    "it"
                )
    check_writable(folder, key=f"storage_path={config.storage_path}")


def _reads(source: str, folder: Path, *, key: str) -> bool:
    """Whether a source includes the files of a folder, which need not exist yet."""
    path = str(absolute(source, key=key))
    if not os.path.isdir(path):
        if "**" not in source or os.path.exists(path):
            return False
        parts = Path(path).parts  # of these, those before the first wildcard
        wild = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        path = str(Path(*parts[:wild]))
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if inside != real and not inside.startswith(real.rstrip(os.sep) + os.sep):
        return False
    # Hidden folders are not read.
    return not any(part.startswith(".") for part in Path(inside).relative_to(real).parts)
