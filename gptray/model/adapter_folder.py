"""Checks whether a PEFT folder is an adapter that fits a model; no torch, so jobs can ask early.

Anything but plain LoRA is refused by name, because gptray does not compute it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptray.config import LoraConfig, UserError
from gptray.model.adapter import (
    ADAPTER,
    BASE_QUANTIZED,
    BASE_SHA256,
    CONFIG,
    PREFIX,
    WEIGHTS,
    A,
    B,
    Base,
    is_named,
    module_of,
)
from gptray.model.adapter_settings import own_settings, settings_of
from gptray.model.packed_weights import PACKINGS
from gptray.model.parameters import HEAD, WTE, Part
from gptray.model.tensor_file import FLOATS, read_header
from gptray.storage.files import expanded
from gptray.storage.stored import read_foreign

# Keys that exclude some of target_modules.
_EXCEPTIONS = ("exclude_modules", "layers_to_transform")
# What follows a layer's name in the weights of any kind of adapter.
_PIECE = re.compile(r"\.(?:base_layer|lora_\w+)(?:\.weight)?$")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that fits a base.

    lora, own: its settings, and those of modules with another rank or alpha. adapted: the weights
    with a low-rank term. replaced: the weights that replace the base's. quantized: how the base was
    quantized in training.
    """

    folder: Path
    lora: LoraConfig
    own: Mapping[str, LoraConfig]
    adapted: tuple[Part, ...]
    replaced: tuple[Part, ...]
    quantized: str = "none"

    def lora_of(self, part: Part) -> LoraConfig:
        """The settings of an adapted part."""
        return self.own.get(module_of(part), self.lora)


def adapter_folder(source: str | Path) -> Path:
    """The folder with adapter_config.json: `source`, or the adapter/ in it. Raises UserError."""
    folder = expanded(source)
    for candidate in (folder, folder / ADAPTER):
        if (candidate / CONFIG).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder}: no such folder")
    raise UserError(f"{folder}: not an adapter: there is no {CONFIG} in it or in its {ADAPTER}/")


def open_adapter(source: str | Path, base: Base) -> Adapter:
    """Open the adapter in a folder for this base, without reading weights.

    Raises UserError, naming the file and what is damaged, unsupported or for another model.
    """
    folder = adapter_folder(source)
    path = folder / WEIGHTS
    raw = read_foreign(folder / CONFIG)
    lora = settings_of(folder / CONFIG, raw)
    if not path.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        kind = " but pickled weights, which gptray does not open" if pickled else ""
        raise UserError(f"{folder}: no {WEIGHTS}{kind}")
    stored, metadata = read_header(path)
    quantized = _check_base(path, metadata, base)
    _check_types(path, stored)
    parts = {module_of(part): part for part in base.linear}
    whole = {part.name: part for part in base.parts}
    adapted = dict[str, Part]()
    replaced = []
    for name in stored:
        if name == PREFIX + HEAD and base.config.tie_word_embeddings:
            continue  # compared with the embedding when the weights are read
        bare = name.removeprefix(PREFIX)
        module = bare.removesuffix(A).removesuffix(B)
        if bare == name or not (bare in whole or (module != bare and module in parts)):
            raise _unknown(path, name, base)
        if module == bare:
            replaced.append(whole[bare])
        else:
            adapted[module] = parts[module]
    own = own_settings(folder / CONFIG, raw, lora, adapted)
    adapter = Adapter(folder, lora, own, tuple(adapted.values()), tuple(replaced), quantized)
    _check_shapes(path, stored, adapter)
    _check_head(path, stored, base, adapter)
    _check_named(path, raw, base, adapter)
    return adapter


def check_products(adapter: Adapter) -> None:
    """Raise UserError for an adapter that replaces weights, which it cannot share with its base."""
    if adapter.replaced:
        names = ", ".join(sorted({module_of(part) for part in adapter.replaced})[:3])
        raise UserError(
            f"{adapter.folder}: it replaces weights of its base ({names}), so it cannot be used "
            "as an adapter; use the merged model in its run's model/ instead"
        )


def _check_base(path: Path, metadata: Mapping[str, str], base: Base) -> str:
    """How the base was quantized, by the weights' metadata. Raises UserError for another base."""
    trained_on = metadata.get(BASE_SHA256)
    quantized = metadata.get(BASE_QUANTIZED, "none")
    if trained_on and trained_on != base.sha256:
        raise UserError(
            f"{path.parent} was trained on another model than {base.source}: one whose weights "
            f"have sha256 {trained_on}, not {base.sha256}"
        )
    if quantized != "none" and quantized not in PACKINGS:
        raise UserError(f"{path}: its base was quantized to an unknown kind, {quantized:.60}")
    return quantized


def _check_types(path: Path, stored: Mapping[str, tuple[list[int], str]]) -> None:
    for name, (_, dtype) in stored.items():
        if dtype not in FLOATS:
            raise UserError(f"{path}: {name} is stored as {dtype}; weights are {', '.join(FLOATS)}")


def _unknown(path: Path, name: str, base: Base) -> UserError:
    """The error for a weight that does not belong to an adapter of this base."""
    module, pieces = _PIECE.subn("", name.removeprefix(PREFIX))
    if pieces and module not in map(module_of, base.linear):
        return UserError(f"{path}: {module} is not a linear layer in the blocks of {base.source}")
    return UserError(f"{path}: {name} is not a weight of an adapter of {base.source}")


def _check_shapes(
    path: Path, stored: Mapping[str, tuple[list[int], str]], adapter: Adapter
) -> None:
    """Raise UserError for a weight that is missing or has the wrong shape."""
    expected = {PREFIX + part.name: part.dims for part in adapter.replaced}
    for part in adapter.adapted:
        rank = adapter.lora_of(part).rank
        assert rank
        outputs, inputs = part.dims[::-1] if part.layout == "transposed" else part.dims
        expected[PREFIX + module_of(part) + A] = [rank, inputs]
        expected[PREFIX + module_of(part) + B] = [outputs, rank]
    for name, dims in expected.items():
        if name not in stored:
            raise UserError(f"{path}: {name} is missing")
        if stored[name][0] != dims:
            raise UserError(
                f"{path}: {name} has shape {stored[name][0]}, but {CONFIG} and this base ask "
                f"for {dims}"
            )


def _check_head(
    path: Path, stored: Mapping[str, tuple[list[int], str]], base: Base, adapter: Adapter
) -> None:
    """Raise UserError for an embedding without its head: PEFT then keeps the base's head."""
    for part in adapter.replaced:
        tied = base.config.tie_word_embeddings and part.parameter == WTE
        if tied and PREFIX + HEAD not in stored:
            raise UserError(
                f"{path}: it has {part.name} but no {HEAD}, so its head is not the embedding, but "
                "the base ties them"
            )


def _check_named(path: Path, raw: Mapping[str, object], base: Base, adapter: Adapter) -> None:
    """Raise UserError if layers that the config names lack weights, or others have some."""
    config = path.parent / CONFIG
    is_target = _targets(config, raw.get("target_modules"))
    saved = _names(config, "modules_to_save", raw.get("modules_to_save") or [])
    adapted = {part.name for part in adapter.adapted}
    have = adapted | {part.name for part in adapter.replaced}
    with_exceptions = any(raw.get(key) not in (None, [], "") for key in _EXCEPTIONS)
    expected = [part for part in base.parts if is_named(module_of(part), saved)]
    for part in base.linear:
        module = module_of(part)
        if is_target(module):
            expected += [] if with_exceptions else [part]
        elif part.name in adapted:
            raise UserError(f"{path}: {module} has weights, but {CONFIG} does not name it")
    for part in expected:
        if part.name not in have:
            raise UserError(f"{path}: no weights for {module_of(part)}, which {CONFIG} names")
    if not have:
        raise UserError(f"{path}: it has no weights")


def _targets(config: Path, given: object) -> Callable[[str], object]:
    """A function that says whether target_modules selects a module: by its name in a list, or by a
    regular expression, as in PEFT. Raises UserError.
    """
    if not isinstance(given, str):
        names = _names(config, "target_modules", given)
        return lambda module: is_named(module, names)
    if given == "all-linear":
        return lambda module: True
    try:
        return re.compile(given).fullmatch
    except re.error as error:
        raise UserError(f"{config}: target_modules={given!r:.60}: {error}") from None


def _names(config: Path, key: str, given: object) -> list[str]:
    """Check a list of module names. Raises UserError."""
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return given
    raise UserError(f"{config}: {key}={given!r:.60} is not a list of names")
