"""What the generate job works on, in the terminal or in bulk, checked without torch or Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptray.config import ComputeConfig, Config, UserError
from gptray.data.batch_requests import CHAT_URL, COMPLETIONS_URL, begins_with_chat
from gptray.data.prompts import check_input
from gptray.data.sources import SourceFile, find_files
from gptray.generation.settings import check_stop_ids
from gptray.jobs.adapters import (
    check_adapter,
    check_adapters,
    name_with,
    with_adapter,
    with_adapters,
)
from gptray.jobs.base import Mistakes
from gptray.jobs.cluster.machine import check_resources
from gptray.jobs.engine_plan import check_engine_backend
from gptray.jobs.generate.output_plan import check_overlap
from gptray.jobs.models import find_model, for_workers
from gptray.model.shape import read_shape
from gptray.model.usage import Usage
from gptray.storage.files import absolute, cached_as, is_uri
from gptray.storage.store_access import why_not_written


@dataclass(frozen=True)
class CheckedModel:
    """A model that exists and that this machine can run. name: its name as given."""

    config: Config
    folder: Path
    name: str


def check_model(config: Config) -> CheckedModel:
    """Find generate.model. Raises UserError if it does not exist or this machine cannot run it."""
    check_resources(config.compute)
    if config.generate.adapters is not None:
        raise UserError(
            "generate.adapters needs generate.input_path; for sample.prompt use generate.adapter"
        )
    config = with_adapter(config, "generate")
    folder, name = find_model(config, config.generate.model, key="generate.model")
    check_adapter(config.generate.adapter, folder, key="generate.adapter")
    check_stop_ids(config.sample, read_shape(folder).rows)
    check_engine_backend(config)
    return CheckedModel(config, folder, name)


@dataclass(frozen=True)
class CheckedBatch:
    """A batch job in which everything exists.

    output: the output folder, or its URI. folder: the same folder; for a URI, the local one that
    has its scratch folder.
    """

    config: Config
    model_dir: Path
    model_name: str
    files: tuple[SourceFile, ...]
    output: str
    folder: Path

    @property
    def model(self) -> str:
        """The model's name on every node: its folder, or the URI that it is fetched from."""
        return for_workers(self.model_dir, self.model_name)

    @property
    def full_name(self) -> str:
        """The model's name in the output, including its adapter's."""
        return name_with(self.model_name, self.config.generate.adapter)


def check_batch(config: Config) -> CheckedBatch:
    """Check the machine, the model, the input's beginning and the output path.

    Raises UserError with all mistakes, one line each.
    """
    settings, mistakes = config.generate, Mistakes()
    files: list[SourceFile] = []
    model_dir, name = Path(), ""
    with mistakes:
        config = with_adapters(with_adapter(config, "generate"), "generate")
        model_dir, name = find_model(config, config.generate.model, key="generate.model")
        check_adapter(config.generate.adapter, model_dir, key="generate.adapter")
        check_adapters(config.generate.adapters, model_dir, key="generate.adapters")
        check_stop_ids(config.sample, read_shape(model_dir).rows)
    if settings.input_path is None:
        mistakes.add(
            "generate.input_path is not set: name a file of prompts, or give sample.prompt=... to "
            "see the answer here"
        )
    else:
        with mistakes:
            files = find_files(
                settings.input_path, key="generate.input_path", encoding=config.data.encoding
            )
            check_input(files, settings)
            if name:
                _check_template(files, settings.prompt_column, model_dir, name)
    if settings.output_path is None:
        mistakes.add("generate.output_path is not set: name a folder for the Parquet files")
    elif is_uri(settings.output_path) and (why := why_not_written(settings.output_path)):
        mistakes.add(f"generate.output_path={settings.output_path}: {why}")
    with mistakes:
        check_engine_backend(config)
    output, folder = _output_of(settings.output_path or "")
    given = settings.input_path or []
    if settings.output_path:
        with mistakes:
            check_overlap(output, [given] if isinstance(given, str) else given, files)
    mistakes.raise_any()
    check_resources(engine_compute(config))
    return CheckedBatch(config, model_dir, name, tuple(files), output, folder)


def _check_template(
    files: list[SourceFile], prompt_column: str, model_dir: Path, name: str
) -> None:
    """Raise UserError for a file of chats if the model has no chat template."""
    chats = next((file.name for file in files if begins_with_chat(file, prompt_column)), None)
    if chats and Usage.of(model_dir).chat_template is None:
        raise UserError(
            f"{chats}: a request is for {CHAT_URL}, but {name} has no chat template; use a model "
            f"that has one, or {COMPLETIONS_URL}"
        )


def _output_of(path: str) -> tuple[str, Path]:
    """The `output` and `folder` of a `CheckedBatch`."""
    if is_uri(path):
        return path.rstrip("/"), cached_as("outputs", path)
    folder = absolute(path, key="generate.output_path")
    return str(folder), folder


def engine_compute(config: Config) -> ComputeConfig:
    """The resources of a batch job's engines: `generate.num_workers` workers."""
    return config.compute.model_copy(update={"num_workers": config.generate.num_workers})
