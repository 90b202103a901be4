"""Checks an export without torch or Ray: the model, the output path, what the format supports."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gptray.config import Config, ExportConfig, UserError
from gptray.config.errors import naming
from gptray.data.gguf_vocabulary import gguf_vocabulary
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import open_tokenizer, tokenizer_files
from gptray.data.vocabulary import needed_rows
from gptray.jobs.base import Mistakes, Plan
from gptray.jobs.models import find_model
from gptray.model.gguf_names import (
    BLOCKS,
    GgufTensor,
    family_of,
    gguf_numbers,
    gguf_tensors,
    gguf_vectors,
    own_network,
)
from gptray.model.packed_weights import GROUP, PACKINGS
from gptray.model.shape import WEIGHTS
from gptray.model.stored_weights import StoredModel, stored_model
from gptray.model.usage import GENERATION, Usage
from gptray.storage.files import absolute, check_writable, is_uri
from gptray.storage.template_file import TEMPLATE
from gptray.wording import size_words

_SUFFIX = ".gguf"
# Files, besides the tokenizer's, that say how to use a model.
_USAGE = (GENERATION, TEMPLATE)
# The most matrices that a sentence names.
_NAMED = 3
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class GgufContent:
    """The content of a GGUF file. kept: a sentence on matrices that cannot be quantized."""

    architecture: str
    fields: dict[str, object]
    tensors: list[GgufTensor]
    vectors: dict[str, list[float]]
    kept: str | None = None

    @property
    def size(self) -> int:
        """Bytes of tensors and texts."""
        texts = (
            len(text.encode()) + 8
            for value in self.fields.values()
            if isinstance(value, list)
            for text in value
            if isinstance(text, str)
        )
        return sum(one.size for one in self.tensors) + sum(texts)


@dataclass(frozen=True)
class HfContent:
    """The content of a Hugging Face folder. copied: unchanged files. kept: see `GgufContent`."""

    copied: list[Path]
    weight_bytes: int
    kept: str | None = None

    @property
    def size(self) -> int:
        """Bytes, without config.json and headers."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copied)

    @property
    def files(self) -> list[str]:
        return sorted(["config.json", WEIGHTS, *(path.name for path in self.copied)])


@dataclass(frozen=True)
class CheckedExport:
    """An export that can start. name: the model's name as given."""

    settings: ExportConfig
    folder: Path
    name: str
    output: Path
    model: StoredModel
    content: GgufContent | HfContent


def check(config: Config) -> CheckedExport:
    """Find every mistake. Raises UserError with all of them, one line each."""
    settings, mistakes = config.export, Mistakes()
    name, folder = "model", Path()
    model, content = None, None
    with mistakes:
        folder, name = find_model(config, settings.model, key="export.model")
        with naming(f"export.model={name}"):
            model = stored_model(folder)
            content = _content(settings, folder, name, model)
    with mistakes:
        output = _output(settings, name)
    mistakes.raise_any()
    assert model and content
    return CheckedExport(settings, folder, name, output, model, content)


def plan(checked: CheckedExport) -> Plan:
    """What the job would write."""
    content = checked.content
    names = content.files if isinstance(content, HfContent) else [checked.output.name]
    return [
        ("model", str(checked.folder)),
        ("format", _format(content)),
        ("precision", checked.settings.precision),
        *([("kept", content.kept)] if content.kept else []),
        ("output", str(checked.output)),
        ("files", " ".join(names)),
        ("size", size_words(content.size)),
    ]


def _format(content: GgufContent | HfContent) -> str:
    if isinstance(content, HfContent):
        return "Hugging Face"
    tokens = content.fields["tokenizer.ggml.model"]
    return f"GGUF, architecture {content.architecture}, tokenizer {tokens}"


def _content(
    settings: ExportConfig, folder: Path, name: str, model: StoredModel
) -> GgufContent | HfContent:
    if settings.format == "hf":
        if model.family.architecture is None:
            raise own_network(model)
        _check_tokenizer(folder, model.embedding.shape[0])
        beside = [folder / one for one in _USAGE if (folder / one).is_file()]
        size = _packed_bytes(model, settings.precision)
        if size is None:
            numbers = sum(math.prod(one.shape) for one in model.weights.values())
            size = BLOCKS[settings.precision][0] * numbers
        kept = None
        if settings.precision in PACKINGS:
            kept = _kept(settings, set(model.linear) - set(model.packable), len(model.linear))
        return HfContent([*beside, *tokenizer_files(folder)], size, kept)
    family, tokenizer = family_of(model), Tokenizer.load(folder)
    usage = Usage.of(folder)
    template = usage.chat_template
    fields = {
        "general.name": _called(name),
        **gguf_numbers(model.shape, family),
        **gguf_vocabulary(tokenizer, rows=model.embedding.shape[0], ends=usage.eos_ids),
        **({_TEMPLATE: template} if template else {}),
    }
    tensors = gguf_tensors(family, model, settings.precision)
    kept = None
    if BLOCKS[settings.precision][1] > 1:
        matrices = [one for one in tensors if one.precision != "fp32"]
        kept = _kept(
            settings, {one.name for one in matrices if one.precision == "fp16"}, len(matrices)
        )
    return GgufContent(family.architecture, fields, tensors, gguf_vectors(model.shape), kept)


def _kept(settings: ExportConfig, names: Collection[str], total: int) -> str | None:
    """A sentence on matrices whose rows are not whole groups. Raises UserError if none's are."""
    if not names:
        return None
    rows = f"a multiple of {GROUP} weights, which export.precision={settings.precision} takes"
    if len(names) == total:
        raise UserError(f"no matrix has rows of {rows}; export.precision=fp16 takes any")
    shown, more = sorted(names)[:_NAMED], len(names) - _NAMED
    listed = ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
    return f"{len(names):,} of {total:,} matrices stay in fp16: {listed}; their rows are not {rows}"


def _packed_bytes(model: StoredModel, precision: str) -> int | None:
    """Bytes of a model with packed linear layers; None for a precision without packing.

    Raises UserError for layers that compressed-tensors cannot pack.
    """
    packing = PACKINGS.get(precision)
    if packing is None:
        return None
    if model.family.transposed:
        raise UserError(
            f"compressed-tensors packs no layers of {model.model_type}, which are Conv1D in "
            "transformers; export.format=gguf takes q8_0, q4_0 and iq4_nl"
        )
    size = 2 * sum(math.prod(one.shape) for one in model.weights.values())
    for one in model.packable.values():
        rows, inputs = one.shape
        size += rows * (4 * packing.words(inputs) + 2 * packing.groups(inputs) - 2 * inputs)
    return size


def _called(name: str) -> str:
    """A model's name without the path and suffix."""
    return Path(name).name.removesuffix(_SUFFIX)


def _check_tokenizer(folder: Path, rows: int) -> None:
    """Raise UserError for a damaged tokenizer, or one with tokens that the embedding lacks."""
    backend, _ = open_tokenizer(str(folder))
    tokens = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if tokens > rows and needed_rows(Tokenizer.load(folder)) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens:,} tokens, but the model's embedding has only "
            f"{rows:,} rows"
        )


def _output(settings: ExportConfig, name: str) -> Path:
    """The path to write. Raises UserError if it exists or cannot be written."""
    key, given = "export.output_path", settings.output_path
    is_gguf = settings.format == "gguf"
    example = f"{_called(name) or 'model'}-{settings.precision}{_SUFFIX if is_gguf else ''}"
    what = "file" if is_gguf else "folder"
    if given is None:
        raise UserError(f"{key} is not set: name the {what} to write, such as {example}")
    if is_uri(given):
        raise UserError(f"{key}={given}: name a {what} on this machine, such as {example}")
    path = absolute(given, key=key)
    if is_gguf and path.is_dir():
        raise UserError(f"{key}={given}: is a folder; name a file, such as {path / example}")
    if is_gguf and path.suffix != _SUFFIX:
        raise UserError(f"{key}={given}: a GGUF file's name ends in {_SUFFIX}, such as {example}")
    if os.path.lexists(path):
        raise UserError(f"{key}={given}: exists already; remove it, or choose another path")
    check_writable(path, key=key)
    return path
