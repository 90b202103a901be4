"""Finds the adapters that a job uses with its model and checks that they fit. No torch, no Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from gptray.config import Config, UserError
from gptray.config.errors import naming
from gptray.jobs.models import run_named
from gptray.model.adapter import ADAPTER, CONFIG, WEIGHTS, Base, adapted_name
from gptray.model.adapter_folder import adapter_folder, check_products, open_adapter
from gptray.storage.files import absolute, is_uri, sha256_of
from gptray.storage.stored import read_foreign

# Sections with keys `model` and `adapter`.
WithAdapter = Literal["evaluate", "generate"]
# Sections with a key `adapters`.
WithAdapters = Literal["generate", "serve"]
# Strings that need no quotes in a YAML mapping.
_PLAIN = re.compile(r"[\w./-]+")


def with_adapter(config: Config, section: WithAdapter) -> Config:
    """Resolve the section's `adapter` to an absolute path, and its `model` to the adapter's base.

    A given `model` stays. Raises UserError, which begins with the key, if there is no such adapter.
    """
    used = getattr(config, section)
    if used.adapter is None:
        return config
    key = f"{section}.adapter"
    folder = _found(config, used.adapter, key=key)
    change = {"adapter": str(folder), "model": used.model or _base_of(folder, key=key)}
    return config.model_copy(update={section: used.model_copy(update=change)})


def with_adapters(config: Config, section: WithAdapters) -> Config:
    """Like `with_adapter`, for the section's `adapters`: paths by name, or a folder of them."""
    used = getattr(config, section)
    if not used.adapters:
        return config
    key, adapters = f"{section}.adapters", used.adapters
    if isinstance(adapters, str):
        folder = _folder_of_adapters(adapters, key=key)
        first, adapters = next(_adapters_in(folder), None), str(folder)
    else:
        found = {name: _found(config, one, key=key) for name, one in adapters.items()}
        first, adapters = next(iter(found.values())), {k: str(one) for k, one in found.items()}
    model = used.model or (first and _base_of(first, key=key))
    change = {"adapters": adapters, "model": model}
    return config.model_copy(update={section: used.model_copy(update=change)})


def check_adapter(source: str | None, model: Path, *, key: str) -> None:
    """Raise UserError, with the key, for an adapter that does not fit the model in a folder."""
    if source is not None:
        with naming(key):
            open_adapter(source, Base(str(model), model))


def check_adapters(sources: Mapping[str, str] | str | None, model: Path, *, key: str) -> None:
    """Like `check_adapter`, for adapters by name that are not merged into the model.

    The serve job itself checks adapters in a folder.
    """
    base = Base(str(model), model)
    for source in sources.values() if isinstance(sources, Mapping) else ():
        with naming(key):
            check_products(open_adapter(source, base))


def adapter_sha256(source: str | None) -> str | None:
    """The sha256 of an adapter's weights; None without an adapter."""
    return None if source is None else sha256_of(Path(source) / WEIGHTS)


def name_with(name: str, source: str | None) -> str:
    """A model's name, with that of its adapter (after its run or folder) if there is one."""
    return name if source is None else adapted_name(name, _name(source))


def adapter_arguments(source: str) -> dict[str, str]:
    """The command-line argument that uses an adapter, by job."""
    pair = (one if _PLAIN.fullmatch(one) else json.dumps(one) for one in (_name(source), source))
    return {
        "evaluate": f"evaluate.adapter={source}",
        "generate": f"generate.adapter={source}",
        "serve": f"serve.adapters={{{': '.join(pair)}}}",
    }


def _name(source: str) -> str:
    """An adapter's name, after its run or folder."""
    folder = Path(source)
    return folder.parent.name if folder.name == ADAPTER else folder.name


def _folder_of_adapters(source: str, *, key: str) -> Path:
    """The absolute path of a folder for adapters, which may be empty. Raises UserError."""
    if is_uri(source):
        raise UserError(f"{key}={source}: adapters must be in a local folder, not at a URI")
    folder = absolute(source, key=key)
    if not folder.is_dir():
        raise UserError(f"{key}: {folder}: no such folder")
    if (folder / CONFIG).is_file():
        raise UserError(
            f"{key}: {folder} is an adapter, not a folder of them; to serve it alone, name it: "
            f"'{key}={{{folder.name}: {source}}}'"
        )
    return folder


def _adapters_in(folder: Path) -> Iterator[Path]:
    for place in sorted(folder.iterdir()):
        with suppress(UserError):  # not an adapter
            yield adapter_folder(place)


def _base_of(folder: Path, *, key: str) -> str:
    """The base model that an adapter names. Raises UserError if it names none."""
    base = read_foreign(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        section = key.partition(".")[0]
        raise UserError(f"{key}: {folder / CONFIG} names no base model; set {section}.model too")
    return base


def _found(config: Config, source: str, *, key: str) -> Path:
    """The folder of the adapter at a path, or of the run of that name."""
    if is_uri(source):
        raise UserError(f"{key}={source}: an adapter must be in a local folder, not at a URI")
    place = absolute(source, key=key)
    run = None if is_uri(config.storage_path) else run_named(config, source)
    if run and not place.exists() and (run / ADAPTER / CONFIG).is_file():
        place = run
    with naming(key):
        return adapter_folder(place)
