"""The config's sections for making a model: data, optim, train, track and tune.

`gptray.config.schema` joins them into one tree; import them from `gptray.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gptray.config.limits import MAX_TRIALS
from gptray.config.values import (
    Backend,
    Natural,
    NonEmpty,
    NonNegative,
    Positive,
    PositiveInt,
    Precision,
    Probability,
    Section,
    Several,
    known_codec,
    split_parts,
)


class DataConfig(Section):
    source: NonEmpty | list[NonEmpty] = Field(
        "builtin",
        description="text to train on: builtin (Python's own documentation), or files, folders or "
        "globs of .txt .md .jsonl .ndjson .json .csv .tsv .parquet (.gz, .zst, .bz2 too), local or "
        "s3://, gs://",
    )
    val_source: NonEmpty | list[NonEmpty] | None = Field(
        None,
        description="separate validation text, in any form of source, instead of a share of it",
    )
    test_source: NonEmpty | list[NonEmpty] | None = Field(
        None, description="separate test text, in any form of source, instead of a share of it"
    )
    text_column: str | None = Field(
        None,
        description="column that holds the text, or chats for the tokenizer's chat template; null: "
        "text, else messages, conversations, or prompt and completion; not for .txt and .md",
    )
    separator: NonEmpty | None = Field(
        None,
        description="string between documents in .txt and .md, such as <|endoftext|>; null: each "
        "file is a document",
    )
    encoding: Annotated[str | None, AfterValidator(known_codec)] = Field(
        None,
        description="encoding of text files, such as cp949; null: by byte order mark, else UTF-8",
    )
    tokenizer: NonEmpty | None = Field(
        None,
        description="bpe (byte-level, trained on the training split), char (one token per "
        "character), a run by name, or a Hugging Face tokenizer's folder, tokenizer.json or hub "
        "id; null: init_from's, else bpe",
    )
    eos_token: NonEmpty | None = Field(
        None,
        description="end-of-text token, if the tokenizer names none or the wrong one",
    )
    # The tokenizer's trainer reserves memory for all entries at once.
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = Field(
        2048, description="entries of a tokenizer trained here (bpe), end-of-text included"
    )
    split: Annotated[tuple[float, ...], BeforeValidator(split_parts)] = Field(
        (0.9, 0.1),
        description="train:val or train:val:test, shares of the text; a document larger than a "
        "share is cut by position",
    )
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of the training split to train on; validation stays the same"
    )
    token_replacement: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0,
        description="share of input tokens (never targets) to replace with random ones in "
        "training, such as 0.1, against overfitting; 0: off",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="seed of the split; null: the run's seed"
    )


class OptimConfig(Section):
    lr: Positive = Field(
        2e-3,
        description="peak learning rate; unless given, all weights of model.init_from get "
        "0.1 / n_embd, and an adapter 1 / n_embd",
    )
    min_lr: NonNegative | None = Field(
        None, description="learning rate at the end of the schedule; null: a tenth of lr"
    )
    schedule: Literal["constant", "linear", "cosine", "step", "wsd"] = Field(
        "cosine",
        description="how lr falls to min_lr after the warm-up; step: multiply by gamma every "
        "step_size steps; wsd (warm-up, stable, decay): keep lr until train.patience runs out or "
        "just enough of train.max_steps is left, then land: go back to the best checkpoint and "
        "cool down from there",
    )
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2,
        description="length of the cool-down as a share of the best checkpoint's steps; counts "
        "towards train.max_steps (schedule: wsd)",
    )
    warmup_steps: Natural = Field(50, description="steps of linear warm-up")
    step_size: PositiveInt = Field(500, description="steps between two drops (schedule: step)")
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="factor of one drop (schedule: step)"
    )
    betas: tuple[Probability, Probability] = Field((0.9, 0.99), description="AdamW's decay rates")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    weight_decay: NonNegative = Field(
        0.1, description="AdamW's weight decay; not applied to biases and norms"
    )
    weight_decay_schedule: Literal["constant", "falling", "rising"] = Field(
        "constant",
        description="falling, rising: while lr falls after the warm-up (wsd: as the run lands), "
        "weight_decay falls to 0 or rises to 1.5 times its value",
    )
    max_grad_norm: Positive | None = Field(
        1.0, description="clip the gradients' global norm to this; null: off"
    )

    @property
    def lands(self) -> bool:
        """Whether training ends with a cool-down from the best checkpoint."""
        return self.schedule == "wsd"

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def cooldown_steps(self, steps: int) -> int:
        """Steps of the cool-down from a checkpoint of `steps`."""
        # The subtraction absorbs the rounding error of products such as 0.1 * 30.
        return max(1, math.ceil(self.decay_fraction * steps - 1e-9))


class TrainConfig(Section):
    max_steps: PositiveInt = Field(
        1000,
        description="optimizer updates, including the cool-down of optim.schedule=wsd; raise it "
        "under the same name to train a run longer",
    )
    global_batch_size: PositiveInt = Field(16, description="sequences per step, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="sequences per forward pass of one worker; null: its whole share",
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
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, such as 0.999, "
        "scored at each evaluation next to the weights themselves; the better of the two is "
        "used; null: off",
    )
    teachers: list[NonEmpty] = Field(
        [],
        description="trained models with the same tokenizer, such as three runs with different "
        "seeds: the model learns the average of their probabilities as well as the text, and can "
        "keep much of what they gain as an ensemble",
    )
    teacher_weight: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5,
        description="share of the loss taken against train.teachers; the rest is against the text",
    )
    async_validation: bool = Field(
        False,
        description="an extra worker scores checkpoints while training continues, with the same "
        "results; a score takes effect at the next evaluation, so early stopping comes one "
        "train.eval_interval later",
    )
    precision: Precision = "auto"
    backend: Backend = Field(
        "auto",
        description="native: gptray's own bf16 code for CPUs with AVX-512 or NEON, built once by "
        "a C++ compiler in a few seconds; auto: that or PyTorch (torch), whichever is faster on "
        "the machine where the run first starts",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile, which needs a compiler and takes up to a minute at the start; "
        "auto: on GPUs",
    )
    deterministic: bool = Field(
        False,
        description="make repeated or resumed runs end bit for bit the same on GPUs too, which "
        "costs about a tenth of the speed; on CPUs they always do",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: resume a run of this name; never: always start a new one"
    )

    def compiles(self, *, on_gpu: bool) -> bool:
        """Whether the training step is compiled."""
        return on_gpu if self.compile == "auto" else self.compile

    def broken_rules(self) -> Iterator[str]:
        if self.backend == "native" and self.precision == "fp32":
            yield "train.backend=native computes in bf16, not train.precision=fp32"


class TrackConfig(Section):
    mlflow: NonEmpty | None = Field(
        None,
        description="send runs to MLflow at this tracking URI, such as http://host:5000 "
        "(gptray[mlflow])",
    )
    wandb: NonEmpty | None = Field(
        None,
        description="send runs to Weights & Biases, to this PROJECT or ENTITY/PROJECT "
        "(gptray[wandb])",
    )
    trackio: NonEmpty | None = Field(
        None, description="send runs to trackio, to this project (gptray[trackio])"
    )


class TuneConfig(Section):
    space: list[dict[str, object]] = Field(
        [],
        description="what trials differ in: a list of paths, each with a choice, grid, uniform, "
        "loguniform or randint, and a condition (when); see configs/overfitting_sweep.yaml",
    )
    num_samples: Annotated[int, Field(gt=0, le=MAX_TRIALS)] = Field(
        16,
        description="trials to draw, for each grid point if there is a grid; raise it under the "
        "same name to add trials to a sweep (TuneConfig)",
    )
    search_alg: Literal["random", "optuna"] = Field(
        "random", description="optuna: suggests from the results of trials (gptray[optuna])"
    )
    baseline: bool = Field(True, description="run one more trial first: the config as it is")
    replicates: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="repeat the best three with this many other seeds; their mean decides"
    )
    retry_failed: bool = Field(
        True,
        description="when the sweep is started again, rerun trials that failed for a passing "
        "reason (a full disk, a process that died) before declaring a winner; false: the best of "
        "the others wins",
    )
    max_concurrent_trials: PositiveInt | None = Field(
        None,
        description="trials that run at a time; null: as many as fit with a core for each "
        "worker, or all if an autoscaler can add nodes (TuneConfig)",
    )
    grace_period: PositiveInt = Field(
        1, description="evaluations before the first rung, where trials are compared (ASHA)"
    )
    reduction_factor: Several = Field(
        3,
        description="the best 1 in this many trials continues from a rung, at once or later; "
        "the next rung is at this many times the steps (ASHA)",
    )
    brackets: PositiveInt = Field(1, description="groups of trials, each with a later first rung")
    min_gain: Annotated[float, Field(ge=0)] = Field(
        0.01,
        description="start no more trials once ten more would improve the best by less than this "
        "with a probability of 95%, in bits per byte; 0: run all, as a grid and Optuna always do",
    )

    def broken_rules(self) -> Iterator[str]:
        if self.search_alg == "optuna" and any("grid" in entry for entry in self.space):
            yield (
                "tune.search_alg=optuna does not take grids; write choice instead of grid in "
                "tune.space"
            )
