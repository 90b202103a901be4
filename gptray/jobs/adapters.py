"""The adapter that a job puts on its model: found, and checked against it. No torch, no Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gptray.config import Config, UserError
from gptray.files import absolute, is_uri, sha256_of
from gptray.jobs.models import run_named
from gptray.model.adapter import ADAPTER, CONFIG, WEIGHTS, Base, adapted_name
from gptray.model.adapter_folder import adapter_folder, check_products, open_adapter
from gptray.stored import read_foreign

# Sections with the keys `model` and `adapter`.
WithAdapter = Literal["evaluate", "generate"]
# Those with `adapters`.
WithAdapters = Literal["generate", "serve"]
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


def with_adapters(config: Config, section: WithAdapters) -> Config:
    """As `with_adapter`, of the section's `adapters`: by their names, or all in a folder."""
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
    """Refuse an adapter that does not fit the model in a folder. Raises UserError with the key."""
    if source is not None:
        with _named(key):
            open_adapter(source, Base(str(model), model))


def check_adapters(sources: Mapping[str, str] | str | None, model: Path, *, key: str) -> None:
    """As `check_adapter`, of adapters that run beside the model, by their names.

    Those in a folder are looked at by whoever serves them.
    """
    base = Base(str(model), model)
    for source in sources.values() if isinstance(sources, Mapping) else ():
        with _named(key):
            check_products(open_adapter(source, base))


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


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Begin what is wrong with the key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _folder_of_adapters(source: str, *, key: str) -> Path:
    """A folder that has adapters in it, now or later. Raises UserError."""
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
        with suppress(UserError):  # something else
            yield adapter_folder(place)


def _base_of(folder: Path, *, key: str) -> str:
    """The model that an adapter says it was trained on. Raises UserError if it does not say."""
    base = read_foreign(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        section = key.partition(".")[0]
        raise UserError(f"{key}: {folder / CONFIG} names no base model; set {section}.model too")
    return base


def _found(config: Config, source: str, *, key: str) -> Path:
    """The folder of an adapter, or of the one that a run of this name has."""
    if is_uri(source):
        raise UserError(f"{key}={source}: an adapter must be in a local folder, not at a URI")
    place = absolute(source, key=key)
    run = None if is_uri(config.storage_path) else run_named(config, source)
    if run and not place.exists() and (run / ADAPTER / CONFIG).is_file():
        place = run
    with _named(key):
        return adapter_folder(place)
