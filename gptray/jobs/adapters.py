"""The adapter that a job puts on its model: found, and checked against it. No torch, no Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from gptray.config import Config, UserError
from gptray.files import absolute, is_uri, sha256_of
from gptray.jobs.models import run_named
from gptray.model.adapter import ADAPTER, CONFIG, WEIGHTS, Base, adapted_name
from gptray.model.adapter_folder import adapter_folder, open_adapter
from gptray.stored import read_foreign

# Sections with the keys `model` and `adapter`.
WithAdapter = Literal["evaluate", "generate"]
# What YAML takes in a mapping as it is.
_PLAIN = re.compile(r"[\w./-]+")


def with_adapter(config: Config, section: WithAdapter) -> Config:
    """The config with the section's `adapter` as a whole path, and the model that it was trained on
    as its `model`, if none is given.

    Raises UserError, which begins with the key, if there is no adapter.
    """
    used = getattr(config, section)
    if used.adapter is None:
        return config
    key = f"{section}.adapter"
    folder = _found(config, used.adapter, key=key)
    change = {"adapter": str(folder), "model": used.model or _base_of(folder, key=key)}
    return config.model_copy(update={section: used.model_copy(update=change)})


def with_adapters(config: Config) -> Config:
    """As `with_adapter`, of serve.adapters."""
    serve = config.serve
    if not serve.adapters:
        return config
    key = "serve.adapters"
    found = {name: _found(config, one, key=key) for name, one in serve.adapters.items()}
    model = serve.model or _base_of(next(iter(found.values())), key=key)
    change = {"adapters": {name: str(folder) for name, folder in found.items()}, "model": model}
    return config.model_copy(update={"serve": serve.model_copy(update=change)})


def check_adapter(source: str | None, model: Path, *, key: str) -> None:
    """Refuse an adapter that does not fit the model in a folder. Raises UserError with the key."""
    if source is None:
        return
    try:
        open_adapter(source, Base(str(model), model))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def adapter_sha256(source: str | None) -> str | None:
    """Of an adapter's weights; None without one."""
    return None if source is None else sha256_of(Path(source) / WEIGHTS)


def called_with(name: str, source: str | None) -> str:
    """What a model is called with an adapter, if there is one, after its run or folder."""
    if source is None:
        return name
    return adapted_name(name, _name(source))


def adapter_words(source: str) -> dict[str, str]:
    """The word of a command that uses a model with an adapter, by job."""
    pair = (one if _PLAIN.fullmatch(one) else json.dumps(one) for one in (_name(source), source))
    return {
        "evaluate": f"evaluate.adapter={source}",
        "generate": f"generate.adapter={source}",
        "serve": f"serve.adapters={{{': '.join(pair)}}}",
    }


def _name(source: str) -> str:
    """That of an adapter's run or folder."""
    folder = Path(source)
    return folder.parent.name if folder.name == ADAPTER else folder.name


def _base_of(folder: Path, *, key: str) -> str:
    """The model that an adapter says it was trained on. Raises UserError if it does not say."""
    base = read_foreign(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        section = key.partition(".")[0]
        raise UserError(f"{key}: {folder / CONFIG} names no base; set {section}.model too")
    return base


def _found(config: Config, source: str, *, key: str) -> Path:
    """The folder of an adapter, or of that of a run by name."""
    if is_uri(source):
        raise UserError(f"{key}={source}: an adapter is taken from a folder, not from a URI")
    place = absolute(source, key=key)
    run = None if is_uri(config.storage_path) else run_named(config, source)
    if run and not place.exists() and (run / ADAPTER / CONFIG).is_file():
        place = run
    try:
        return adapter_folder(place)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
