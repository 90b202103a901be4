"""The typed config tree that all jobs share, and the rules across its sections.

`reader` reads YAML and the command line. Rules that need files, GPUs or a tokenizer are checked
where those are used. A field is named as in the API that finally receives it (HF, torch, Ray).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, ValidationError
from yaml import YAMLError

from gptray.config.compute import ComputeConfig
from gptray.config.errors import ConfigError, UserError
from gptray.config.keys import EntriesError
from gptray.config.lora_section import LEARNING_RATE_FACTOR, LoraConfig
from gptray.config.model_section import ModelConfig
from gptray.config.names import checked_name
from gptray.config.reader import Reader, nested
from gptray.config.search_space import space_problems
from gptray.config.sections import DataConfig, OptimConfig, TrackConfig, TrainConfig, TuneConfig
from gptray.config.serve_section import ServeConfig
from gptray.config.use_sections import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    QuantizeConfig,
    SampleConfig,
)
from gptray.config.values import NonEmpty, Section
from gptray.config.yaml_text import read_written, write_yaml


class Config(Section):
    """Everything a job needs. Defaults are the quick start: builtin text, a small model, a CPU."""

    name: Annotated[str, AfterValidator(checked_name)] | None = Field(
        None,
        description="name of the run and of its folder in storage_path, in letters and digits of "
        "any script; null: derived from the config (Ray RunConfig)",
    )
    storage_path: NonEmpty = Field(
        "~/gptray",
        description="folder for all runs, which every node of a cluster must see, or a URI such "
        "as s3://bucket/runs (Ray RunConfig)",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        1337, description="seed of the split, the initial weights, the batch order and dropout"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    track: TrackConfig = TrackConfig()
    sample: SampleConfig = SampleConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()
    serve: ServeConfig = ServeConfig()
    export: ExportConfig = ExportConfig()

    if not TYPE_CHECKING:  # type checkers know the keys from the fields

        def __init__(self, **given: object) -> None:
            """Raises ConfigError as `load_config` does, with all mistakes at once."""
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise _explained(given, error) from None

        # Otherwise pydantic would also call it to validate what `Reader` has read.
        __init__.__pydantic_base_init__ = True

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass of one worker."""
        return (
            self.train.micro_batch_size or self.train.global_batch_size // self.compute.max_workers
        )

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step, of all workers together."""
        return self.train.global_batch_size // self.micro_batch_size

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes of one worker per optimizer step, if no worker is missing."""
        return math.ceil(self.micro_batches / self.compute.max_workers)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, all workers."""
        return self.train.global_batch_size * self.train.block_size

    @property
    def derives_lr(self) -> bool:
        """Whether optim.lr is still to follow from the width of model.init_from: `tuning_lr`."""
        return self.model.init_from is not None and "lr" not in self.optim.model_fields_set

    @property
    def tuning_lr(self) -> float:
        """The default of optim.lr to train a given model, or an adapter of it, further.

        It falls with the width, as the best rate in Adam does (Yang et al. 2021, muP).
        """
        return (LEARNING_RATE_FACTOR if self.lora.rank else 1) * 0.1 / self.model.n_embd

    @property
    def stable_steps(self) -> int:
        """The most steps before a landing, so that its cool-down ends within train.max_steps.

        Without a landing, all steps.
        """
        most = self.train.max_steps
        if not self.optim.lands:
            return most
        steps = math.ceil(most / (1 + self.optim.decay_fraction))
        while steps + self.optim.cooldown_steps(steps) > most:
            steps -= 1
        return steps

    def broken_rules(self) -> Iterator[str]:
        train, compute, lora = self.train, self.compute, self.lora
        is_sharded, lr, least = compute.strategy == "fsdp", self.optim.lr, self.optim.min_lr
        if least is not None and least > lr and not self.derives_lr:
            yield f"optim.min_lr={least:g} must not be above optim.lr={lr:g}"
        if self.optim.lands and train.max_steps < 2:
            yield (
                "optim.schedule=wsd needs train.max_steps=2 or more, because the cool-down takes "
                "at least one"
            )
        if is_sharded and train.ema is not None:
            yield (
                "train.ema cannot be combined with compute.strategy=fsdp: it averages whole "
                "weights on each worker"
            )
        if is_sharded and train.teachers:
            yield (
                "train.teachers cannot be combined with compute.strategy=fsdp: each worker holds "
                "them whole"
            )
        if lora.rank is not None and self.model.init_from is None:
            yield "lora.rank needs model.init_from, the model to adapt"
        for key, is_set in {
            "model.resize_vocab=true": self.model.resize_vocab,
            "train.ema": train.ema is not None,
            "compute.strategy=fsdp": is_sharded,
        }.items():
            if lora.rank is not None and is_set:
                yield f"lora.rank cannot be combined with {key}"
        if problems := space_problems(self.tune.space, type(self)):
            raise EntriesError("tune.space", problems)
        if train.block_size > self.model.n_positions:
            yield (
                f"train.block_size={train.block_size} must not be above "
                f"model.n_positions={self.model.n_positions}"
            )
        if train.async_validation and compute.is_elastic:
            yield (
                "train.async_validation=true needs a fixed number of workers, such as "
                f"compute.num_workers={compute.max_workers}, not {compute.workers_shown}: "
                "training would grow into the scoring worker's resources"
            )
        yield from self._uneven_batch()

    def _uneven_batch(self) -> Iterator[str]:
        micro, workers = self.train.micro_batch_size, self.compute
        factors = {f"train.micro_batch_size={micro}": micro} if micro else {}
        if not workers.is_elastic:
            factors[f"compute.num_workers={workers.workers_shown}"] = workers.max_workers
        elif not micro:
            most = f"the maximum of compute.num_workers={workers.workers_shown}"
            factors[most] = workers.max_workers
        batch, per_pass = self.train.global_batch_size, math.prod(factors.values())
        if batch % per_pass:
            yield (
                f"train.global_batch_size={batch} must be divisible by {' x '.join(factors)}"
                f", such as {max(1, round(batch / per_pass)) * per_pass}"
            )


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults changed by a YAML file and then by section.field=value arguments.

    Raises ConfigError with all mistakes at once; UserError for arguments of another type.
    """
    if not isinstance(path, str | Path | None) or path == "":
        raise UserError(f"path must name a YAML file or be None, not {path!r:.60}")
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise UserError(
            "overrides must be a list, such as ['optim.lr=0.1', 'name=first'], not "
            f"{overrides!r:.60}"
        )
    reader = Reader(Config)
    if path is not None:
        reader.read_file(str(path))
    for argument in map(str, overrides):
        reader.read_argument(argument)
    return reader.build(Config)


def _explained(given: Mapping[str, object], error: ValidationError) -> ValueError:
    """The ConfigError for values that pydantic refuses; `error` itself if all of them are valid."""
    reader = Reader(Config)
    for key, value in _dotted(given).items():
        reader.read_value(key, value)
    try:
        reader.build(Config)
    except ConfigError as mistakes:
        return mistakes
    return error


def expect_config(given: object) -> Config:
    """The argument of a public function, if it is a Config. Raises UserError."""
    if not isinstance(given, Config):
        raise UserError(
            f"config must be a gptray.Config, as gptray.load_config() returns, not {given!r:.60}"
        )
    return given


def load_saved(path: Path) -> Config:
    """Load the config that a run saved, five times as fast as `load_config` and with its errors."""
    try:
        return Config.model_validate(read_written(path))
    except (OSError, ValueError, TypeError, YAMLError):  # load_config says what is wrong
        return load_config(str(path), [])


def override(config: Config, values: Mapping[str, object]) -> Config:
    """Return the config with dotted keys set, validated again; raises ConfigError."""
    reader = Reader(Config)
    for key, value in {**flatten(config), **values}.items():
        reader.read_value(key, value)
    return reader.build(Config)


def dump(config: Config) -> str:
    """Return the whole config as YAML that `load_config` reads into an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def differences(config: Config) -> dict[str, object]:
    """The dotted keys that differ from the defaults, with their values.

    With model.init_from, optim.lr has another default, so it counts whenever it was given.
    """
    defaults = flatten(Config())
    always = {"optim.lr"} if config.model.init_from and not config.derives_lr else set()
    return {
        key: value
        for key, value in flatten(config).items()
        if value != defaults[key] or key in always
    }


def dump_differences(config: Config) -> str:
    """As `dump`, but only what differs from the defaults; "" if nothing does."""
    values = nested(differences(config))
    return write_yaml(values) if values else ""


def flatten(config: Config, *, given: bool = False) -> dict[str, object]:
    """Return every dotted key of the config with its value; with `given`, only those given."""
    return _dotted(config.model_dump(exclude_unset=given))


def _dotted(tree: Mapping[str, object]) -> dict[str, object]:
    """The values of a tree by dotted keys; its sections are mappings, or sections of a Config."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        inside = value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
        if isinstance(inside, dict):
            flat |= {f"{name}.{key}": inner for key, inner in inside.items()}
        else:
            flat[name] = inside
    return flat
