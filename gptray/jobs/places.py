"""Where a run and its text lie: apart from each other, and said so that commands work anywhere.

No torch, no Ray.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptray.config import Config, UserError, load_saved
from gptray.config.named_texts import named_texts
from gptray.data.sources import BUILTIN
from gptray.data.tokenizer_files import KINDS
from gptray.files import absolute, check_writable, expanded
from gptray.jobs.models import CONFIG
from gptray.node_cache import storage_folder

_OF_DATA = ("data.source", "data.val_source", "data.test_source")
# Keys whose values are paths.
SOURCES = (*_OF_DATA, "evaluate.also")


def with_whole_paths(config: Config) -> Config:
    """The config with its text's and tokenizer's paths from the root on.

    In a job that was submitted to a cluster they stay: its folder is a copy that goes away.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return config
    data = config.data
    changed: dict[str, object] = {}
    for key in _OF_DATA:
        name = key.removeprefix("data.")
        value = getattr(data, name)
        if value is not None and (whole := _whole(value, key=key)) != value:
            changed[name] = whole
    tokenizer = data.tokenizer
    if tokenizer and tokenizer not in KINDS and expanded(tokenizer).exists():
        changed["tokenizer"] = _whole(tokenizer)
    also = {
        name: _whole(source, key="evaluate.also")
        for name, source in named_texts(config.evaluate.also).items()
    }
    evaluate = config.evaluate.model_copy(update={"also": also}) if also else config.evaluate
    return config.model_copy(update={"data": data.model_copy(update=changed), "evaluate": evaluate})


def is_same_place(before: object, now: object) -> bool:
    """Whether two values of a key of paths may mean the same text or tokenizer.

    A relative path is the same as one that ends with it: a folder may have been moved, and whether
    the text is the one of before is checked by its tokens.
    """
    if isinstance(before, str) and isinstance(now, str):
        ends = not os.path.isabs(now) and before.endswith(os.sep + os.path.normpath(now))
        return ends or _whole(before) == _whole(now)
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.keys() == now.keys():
        return all(is_same_place(before[name], now[name]) for name in before)
    if isinstance(before, Sequence) and isinstance(now, Sequence) and len(before) == len(now):
        return all(map(is_same_place, before, now))
    return bool(before == now)


def words_for(folder: Path) -> list[str]:
    """What a command with a run's saved config needs in addition, if the run has been moved."""
    if not (folder / CONFIG).is_file():
        return []
    saved = load_saved(folder / CONFIG)
    storage = storage_folder(saved.storage_path)
    if saved.name and (storage / saved.name).resolve() == folder.resolve():
        return []
    return [f"name={folder.name}", f"storage_path={folder.parent}"]


def _whole(source: str | list[str], *, key: str | None = None) -> str | list[str]:
    if isinstance(source, str):
        is_path = source != BUILTIN and "://" not in source
        return str(absolute(source, key=key)) if is_path else source
    return [one if "://" in one else str(absolute(one, key=key)) for one in source]


def check_storage(config: Config) -> None:
    """Refuse a storage_path that cannot be written, or whose files would become text.

    Raises:
        UserError: names storage_path, and the source that reads what is there.
    """
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
    """Whether a source takes in the files of a folder, which need not be there yet."""
    path = str(absolute(source, key=key))
    if not os.path.isdir(path):
        if "**" not in source or os.path.exists(path):
            return False
        path = _fixed_part(path)
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if inside != real and not inside.startswith(real.rstrip(os.sep) + os.sep):
        return False
    # Hidden folders are not read.
    return not any(part.startswith(".") for part in Path(inside).relative_to(real).parts)


def _fixed_part(pattern: str) -> str:
    """The folder of a glob in which everything it matches lies."""
    parts = Path(pattern).parts
    wild = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:wild]))
