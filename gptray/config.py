"""The one typed config tree of every job: defaults, ranges and the rules that join several keys.

How YAML and the command line are read is in `gptray.overrides`; rules that need the world
(files, GPUs, a tokenizer) stand where that world is used.
A field has the name of the API that finally receives it (HF, torch, Ray).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gptray.fields import EntriesError
from gptray.overrides import Reader
from gptray.space import space_problems
from gptray.yaml_text import write_yaml

PositiveInt = Annotated[int, Field(gt=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class UserError(ValueError):
    """A mistake of the user's: its message names the key or file and what to change; exit 2."""


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class RunFailed(RuntimeError):
    """A run that cannot go on; its message says all that the user needs; exit code 1."""


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _parts(value: Any) -> Any:
    """Read a split given as "90:10" or as a list of any scale into fractions that sum to one."""
    if isinstance(value, str):
        value = value.split(":")
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= 3:
        raise ValueError("give train:val or train:val:test, such as 90:10 or 80:10:10")
    try:
        parts = [float(part) for part in value]
    except (TypeError, ValueError):
        raise ValueError("give train:val or train:val:test, such as 90:10 or 80:10:10") from None
    if not all(0 < part < float("inf") for part in parts):
        raise ValueError("every part of the split must be above 0")
    total = sum(parts)
    # An already normalised split stays as it is, so that a dumped config equals its source.
    return tuple(parts) if abs(total - 1) < 1e-9 else tuple(part / total for part in parts)


class DataConfig(Section):
    source: str | list[str] = Field(
        "builtin",
        description="text to train on: builtin (documentation that Python carries), or files, "
        "folders or globs of .txt .md .jsonl .csv .parquet (.gz and .zst too), local or s3://, gs://",
    )
    text_column: str = Field(
        "text", description="column of .jsonl .csv .parquet that holds the text"
    )
    tokenizer: str | None = Field(
        None,
        description="bpe (byte-level, trained on the training split), char (one token a "
        "character), or a Hugging Face tokenizer's folder or hub id; null: init_from's, else bpe",
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        2048, description="entries of a tokenizer trained here (bpe), end-of-text included"
    )
    split: Annotated[tuple[float, ...], BeforeValidator(_parts)] = Field(
        (0.9, 0.1),
        description="train:val or train:val:test, by document (one document: by position)",
    )
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="part of the training split to train on; validation stays the same"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="rules the split; null: the run's seed"
    )


class ModelConfig(Section):
    n_layer: PositiveInt = Field(2, description="blocks")
    n_head: PositiveInt = Field(4, description="attention heads; must divide n_embd")
    n_embd: PositiveInt = Field(256, description="width of the residual stream")
    n_inner: PositiveInt | None = Field(None, description="width of the MLP; null: 4 x n_embd")
    n_positions: PositiveInt = Field(128, description="longest context, in tokens")
    vocab_size: PositiveInt | None = Field(
        None, description="rows of the embedding; null: the tokenizer's; larger pads it"
    )
    dropout: Probability = Field(
        0.0, description="of embeddings, attention and residuals (HF's three)"
    )
    norm: Literal["layernorm", "none"] = Field(
        "layernorm", description="none: ablation, no normalisation"
    )
    residual: bool = Field(True, description="false: ablation, no skip connections")
    layer_norm_epsilon: Positive = Field(1e-5, description="added to the variance")
    initializer_range: Positive = Field(0.02, description="standard deviation of initial weights")
    init_from: str | None = Field(
        None, description="start from these weights: an HF GPT-2 folder, a run folder or a hub id"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} must be divisible by model.n_head={self.n_head}"
                f", such as {max(1, round(self.n_embd / self.n_head)) * self.n_head}"
            )
        return self


class OptimConfig(Section):
    lr: Positive = Field(2e-3, description="peak learning rate")
    min_lr: NonNegative = Field(2e-4, description="learning rate at the end of the schedule")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field(
        "cosine",
        description="how lr falls to min_lr after the warm-up; step: times gamma every step_size",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="steps of linear warm-up")
    step_size: PositiveInt = Field(500, description="steps between two drops (schedule: step)")
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="factor of one drop (schedule: step)"
    )
    betas: tuple[Probability, Probability] = Field((0.9, 0.99), description="AdamW's decay rates")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    weight_decay: NonNegative = Field(0.1, description="AdamW's; none on biases and norms")
    max_grad_norm: Positive | None = Field(1.0, description="clip the global norm here; null: off")

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr:g} must not be above optim.lr={self.lr:g}")
        return self


class TrainConfig(Section):
    max_steps: PositiveInt = Field(1000, description="optimizer updates")
    global_batch_size: PositiveInt = Field(16, description="sequences per step, all workers")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="sequences per forward pass of one worker; null: all of its share",
    )
    block_size: PositiveInt = Field(128, description="tokens in a sequence, at most n_positions")
    eval_interval: PositiveInt = Field(
        100, description="steps between evaluations (and checkpoints)"
    )
    log_interval: PositiveInt = Field(10, description="steps between rows of metrics.jsonl")
    patience: PositiveInt | None = Field(
        5, description="stop after this many evaluations without a new best; null: never"
    )
    min_delta: NonNegative = Field(
        0.0, description="nats that validation loss must fall to count as new best"
    )
    async_validation: bool = Field(
        False,
        description="a worker besides compute.num_workers scores the checkpoints while training "
        "goes on, to the same numbers; a score counts at the next evaluation, so early stopping "
        "comes one train.eval_interval later",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the processor or GPU computes in it, else fp32"
    )
    compile: bool = Field(
        False, description="torch.compile; needs a C++ compiler, pays on longer runs"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on with a run of this name; never: only start a new one"
    )


class ComputeConfig(Section):
    num_workers: PositiveInt = Field(1, description="data-parallel workers (Ray ScalingConfig)")
    use_gpu: bool = Field(False, description="one GPU for each worker (nccl); else CPUs (gloo)")
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="of a GPU; below 1, trials of a sweep share one (use_gpu, one worker)"
    )
    cpus_per_worker: PositiveInt | None = Field(
        None, description="cores of one worker; null: its share of the cluster's smallest fit"
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        3, description="worker failures to recover from; -1: no limit (Ray FailureConfig)"
    )
    num_to_keep: PositiveInt = Field(2, description="newest checkpoints to keep, besides the best")

    @model_validator(mode="after")
    def _whole_gpus_for_nccl(self) -> ComputeConfig:
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"compute.gpus_per_worker={self.gpus_per_worker:g} goes with one worker; "
                f"compute.num_workers={self.num_workers} need a GPU each"
            )
        return self


class SampleConfig(Section):
    """How text is continued; names and meaning are Hugging Face's GenerationConfig."""

    prompt: str | list[str] | None = Field(
        None, description="prompts of the samples; null: the first words of validation text"
    )
    max_new_tokens: PositiveInt = Field(64, description="tokens to add at most")
    min_new_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens to add before the text may end"
    )
    temperature: NonNegative = Field(0.7, description="0: greedy")
    top_k: PositiveInt | None = Field(40, description="sample from the k likeliest; null: from all")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="sample from the likeliest that make up this probability; null: off"
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="drop what is less likely than this part of the likeliest; null: off"
    )
    repetition_penalty: Positive = Field(
        1.0, description="divides the logits of tokens that were there; 1: off"
    )
    stop: NonEmpty | list[NonEmpty] | None = Field(
        None, description="texts that end the output, and are no part of it"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the sampler")

    @model_validator(mode="after")
    def _min_below_max(self) -> SampleConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sample.min_new_tokens={self.min_new_tokens} must not be above "
                f"sample.max_new_tokens={self.max_new_tokens}"
            )
        return self


class QuantizeConfig(Section):
    weights: Literal["none", "int8"] = Field(
        "none",
        description="of the model that generates; int8: faster with large models, a little less "
        "exact, on CPUs",
    )


class GenerateConfig(Section):
    model: str | None = Field(
        None,
        description="what generates: a run folder, a model folder, an HF GPT-2 folder or hub id; "
        "null: the run that name says, else the newest in storage_path",
    )
    input_path: str | list[str] | None = Field(
        None,
        description="prompts: files, folders or globs of .parquet .jsonl .csv .txt (a line each)",
    )
    output_path: str | None = Field(
        None, description="folder for the Parquet files; on a cluster one that every node sees"
    )
    prompt_column: str = Field("prompt", description="column that holds the prompts")
    id_column: str | None = Field(
        None, description="column that names each row; null: id where there is one, else position"
    )
    num_workers: PositiveInt = Field(1, description="engines, each with its share of the cluster")
    max_batch_size: PositiveInt = Field(32, description="sequences that one engine runs at a time")
    rows_per_file: PositiveInt = Field(
        256, description="rows of one Parquet file; a killed job does open files again"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the processor or GPU computes in it, else fp32"
    )
    backend: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: the project's own code for CPUs with AVX-512, twice as fast, built by "
        "a C++ compiler in some seconds once; auto: that where it can be had, else PyTorch",
    )


class EvaluateConfig(Section):
    model: str | None = Field(
        None,
        description="what is evaluated: a run folder, a model folder, an HF GPT-2 folder or hub "
        "id; null: this run's own model/",
    )
    source: str | list[str] | None = Field(
        None,
        description="text to score as a whole, in place of the splits: what data.source takes; "
        "its loss is test_loss",
    )
    stride: PositiveInt | None = Field(
        None,
        description="tokens between two windows; the rest of a window is context from the one "
        "before, slower and fairer; null: train.block_size, no overlap",
    )
    micro_batch_size: PositiveInt = Field(
        16, description="windows per forward pass of one worker; changes no result"
    )
    train_tokens: PositiveInt = Field(
        100_000, description="tokens of the training split to score, spread over it evenly"
    )
    passages: Annotated[int, Field(ge=0)] = Field(
        64, description="passages to continue, for BLEU and memorisation; 0: none"
    )


class TuneConfig(Section):
    space: list[dict[str, Any]] = Field(
        [],
        description="what trials differ in: a list of paths, each with a choice, grid, uniform, "
        "loguniform or randint, and a condition (when); see configs/overfitting_sweep.yaml",
    )
    num_samples: PositiveInt = Field(
        16, description="trials drawn, for each point of the grid where there is one (TuneConfig)"
    )
    search_alg: Literal["random", "optuna"] = Field(
        "random", description="optuna: suggests from what trials came to (gptray[optuna])"
    )
    baseline: bool = Field(True, description="one trial more, first, of the config as it is")
    replicates: Annotated[int, Field(ge=0)] = Field(
        0, description="other seeds with which the best three are repeated; their mean decides"
    )
    max_concurrent_trials: PositiveInt | None = Field(
        None, description="null: as many as find room, each worker with a core (TuneConfig)"
    )
    grace_period: PositiveInt = Field(
        1, description="evaluations before a trial may be stopped (ASHAScheduler)"
    )
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="of so many trials one goes on beyond a rung (ASHAScheduler)"
    )
    brackets: PositiveInt = Field(
        1, description="groups of trials, each with its first rung later (ASHAScheduler)"
    )

    @model_validator(mode="after")
    def _optuna_has_no_grid(self) -> TuneConfig:
        if self.search_alg == "optuna" and any("grid" in entry for entry in self.space):
            raise ValueError("tune.search_alg=optuna draws; write choice for grid in tune.space")
        return self


class Config(Section):
    """Everything a job needs. Defaults are the quick start: builtin text, a small model, a CPU."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the run's folder in storage_path; null: made from the config (Ray RunConfig)",
    )
    storage_path: str = Field(
        "~/gptray",
        description="folder of all runs; on a cluster one that every node sees (Ray RunConfig)",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        1337, description="rules the split, the initial weights, the batch order and dropout"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    sample: SampleConfig = SampleConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass of one worker."""
        return (
            self.train.micro_batch_size or self.train.global_batch_size // self.compute.num_workers
        )

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes of one worker per optimizer step."""
        return self.train.global_batch_size // (self.micro_batch_size * self.compute.num_workers)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, all workers."""
        return self.train.global_batch_size * self.train.block_size

    @model_validator(mode="after")
    def _space_is_sound(self) -> Config:
        problems = space_problems(self.tune.space, type(self))
        if problems:
            raise EntriesError("tune.space", problems)
        return self

    @model_validator(mode="after")
    def _int8_on_cpus(self) -> Config:
        if self.quantize.weights == "int8" and self.compute.use_gpu:
            raise ValueError("quantize.weights=int8 is for CPUs, not with compute.use_gpu=true")
        return self

    @model_validator(mode="after")
    def _block_fits_positions(self) -> Config:
        if self.train.block_size > self.model.n_positions:
            raise ValueError(
                f"train.block_size={self.train.block_size} must not be above "
                f"model.n_positions={self.model.n_positions}"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        micro = self.train.micro_batch_size
        per_pass = (micro or 1) * self.compute.num_workers
        if self.train.global_batch_size % per_pass:
            factor = f"train.micro_batch_size={micro} x " if micro else ""
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} must be divisible by "
                f"{factor}compute.num_workers={self.compute.num_workers}"
                f", such as {max(1, round(self.train.global_batch_size / per_pass)) * per_pass}"
            )
        return self


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Return the defaults changed by a YAML file and then by section.field=value arguments.

    Raises ConfigError with all mistakes at once.
    """
    reader = Reader(Config)
    if path is not None:
        reader.read_file(path)
    for argument in overrides:
        reader.read_argument(argument)
    return _built(reader)


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with dotted keys set, validated anew; raises ConfigError."""
    reader = Reader(Config)
    for key, value in {**flatten(config), **values}.items():
        reader.read_value(key, value)
    return _built(reader)


def dump(config: Config) -> str:
    """Return the whole config as YAML that `load_config` reads into an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def flatten(config: Config, *, given: bool = False) -> dict[str, Any]:
    """Return every key of the config, dotted, with its value; with `given` only those once set."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(exclude_unset=given).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _built(reader: Reader) -> Config:
    config = reader.build(Config)
    if config is None:
        raise ConfigError(reader.problems)
    return config
