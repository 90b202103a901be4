"""Checks a training before it starts, and makes the rows of its --dry-run.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptray.config import Config, UserError
from gptray.config.errors import naming
from gptray.data.order import BatchOrder
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData
from gptray.generation.settings import check_stop_ids
from gptray.jobs.base import Plan
from gptray.jobs.cluster.machine import check_training
from gptray.jobs.folders.remote_run import download_run
from gptray.jobs.folders.resuming import (
    check_free,
    check_not_landing,
    check_records,
    check_resumable,
    is_finished,
)
from gptray.jobs.folders.run_folder import resolve, run_dir, run_place
from gptray.jobs.prepare.check import CheckedText, check_text, column_row, text_rows
from gptray.jobs.prepare.other_texts import OtherTexts, check_also
from gptray.jobs.progress.trackers import check_trackers
from gptray.jobs.train.given_models import (
    check_base,
    check_teachers,
    check_tokenizer,
    check_vocabulary,
    trained_parameters,
)
from gptray.jobs.train.memory_plan import frozen_bytes, memory_words, shards_weights
from gptray.model.families import FAMILIES
from gptray.model.parameters import parameter_count
from gptray.model.shape import saved_type
from gptray.training.checkpoint import newest_intact
from gptray.training.trainer_state import TrainerState

BUSY = "another process is training the run {}"
FILES = (
    "config.yaml metrics.jsonl events.jsonl report.html loss.png lr.png grad_norm.png "
    "tensorboard/ checkpoint_*/ model/"
)


@dataclass(frozen=True)
class CheckedTraining:
    """A training that can start.

    also: the texts of evaluate.also. state: the run's state; None before its first checkpoint.
    changes: a sentence for each key that changes in an existing run.
    """

    config: Config
    folder: Path
    text: CheckedText
    also: OtherTexts
    state: TrainerState | None
    changes: Sequence[str]

    @property
    def is_finished(self) -> bool:
        """Whether the run has nothing left to do."""
        return self.state is not None and is_finished(self.config, self.folder, self.state)


def check(config: Config) -> CheckedTraining:
    """Resolve the config and find every mistake that can be found without torch and Ray.

    Raises UserError for mistakes; RunFailed if the run has checkpoints, but none is intact.
    """
    config = resolve(config)
    folder, busy = run_dir(config), BUSY.format(run_place(config))
    download_run(config, busy=busy)
    check_training(config)
    check_trackers(config.track)
    text = check_text(config)
    check_vocabulary(config)
    if config.sample.prompt or config.sample.stop_token_ids:
        check_prompts(config, text.tokenizer)
    also = check_also(config, config, trained_on=text.request)
    changes = check_resumable(config)
    check_free(folder, busy=busy)
    checkpoint, _ = newest_intact(folder)
    state = TrainerState.load(checkpoint) if checkpoint else None
    check_base(config, checkpoint)
    check_not_landing(config, changes, state)
    check_records(folder, state, log_interval=config.train.log_interval)
    checked = CheckedTraining(config, folder, text, also, state, changes)
    if checked.is_finished:
        return checked
    check_teachers(config, folder)
    if text.data:
        check_data(config, text.data, state)
    elif text.tokenizer:
        check_tokenizer(config, text.tokenizer)
    return checked


def check_prompts(config: Config, tokenizer: Tokenizer | None) -> None:
    """Raise UserError for prompts that the tokenizer cannot read, and stop tokens that it lacks.

    tokenizer: None if it is not known yet.
    """
    if tokenizer is None:
        return
    check_stop_ids(config.sample, tokenizer.vocab_size)
    prompts = config.sample.prompt or []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        with naming(f"sample.prompt={prompt!r}"):
            tokenizer.prompt_ids(prompt, parse_special=config.sample.parse_special)


def check_data(config: Config, data: TokenData, state: TrainerState | None) -> None:
    """Raise UserError for tokens unfit for training, or that differ from those of the run."""
    check_tokenizer(config, data.tokenizer)
    try:
        BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed)
    except ValueError as error:
        more = "raise data.fraction or " if config.data.fraction < 1 else ""
        told = f"training text is too short: {error}; {more}lower train.block_size"
        raise UserError(told) from None
    if len(data.val) < 2:
        raise UserError("the validation split has fewer than 2 tokens; change data.split")
    check_prompts(config, data.tokenizer)
    if state and state.data != data.fingerprint:
        raise UserError(
            f"the text or tokenizer of the run {config.name} has changed since it started "
            f"(data {state.data}, now {data.fingerprint}); choose another name"
        )


def plan(checked: CheckedTraining) -> Plan:
    """What the job would do."""
    config, data = checked.config, checked.text.data
    vocab_size = config.model.vocab_size or (data.vocab_size if data else None)
    if vocab_size is None and config.data.tokenizer == "bpe":
        vocab_size = config.data.vocab_size
    steps, batch = config.train.max_steps, config.train.global_batch_size
    rows = [
        ("run", run_place(config)),
        ("workers", _workers(config)),
        ("sequences per step", f"{batch:,} of {config.train.block_size:,} tokens"),
        ("tokens per step", f"{config.tokens_per_step:,}"),
        ("micro-batch", _passes(config)),
        ("tokens in all", f"{config.tokens_per_step * steps:,} at most"),
        ("peak learning rate", _peak_rate(config)),
    ]
    if config.optim.lands:
        stable = config.stable_steps
        landing = (
            f"after step {stable:,}, or when patience runs out: back to the best checkpoint and a "
            f"cool-down of {config.optim.decay_fraction:g} of its steps, "
            f"{config.optim.cooldown_steps(stable):,} at most"
        )
        rows.append(("landing", landing))
    if teachers := config.train.teachers:
        share = f"{config.train.teacher_weight:g} of the loss"
        rows.append(("teachers", f"{share} is against {', '.join(teachers)}"))
    if checked.changes:
        rows.append(("changes", "; ".join(checked.changes)))
    if vocab_size:
        count = parameter_count(config.model, vocab_size)
        rows.append(("parameters", f"{count:,}"))
        if trained := trained_parameters(config):
            adapter = f"an adapter of rank {config.lora.rank}"
            rows.append(("trained", f"{trained:,} ({trained / count:.2%}), {adapter}"))
        rows.append(("saved as", _family(config)))
        rows.append(("memory per worker", memory_words(config, count, vocab_size)))
        if config.lora.rank and not config.compute.use_gpu:
            shared = f"{frozen_bytes(config, count) / 2**30:.2f} GiB of that, the frozen base"
            rows.append(("shared memory", f"{shared}: all processes of a machine hold it once"))
    else:
        rows.append(("parameters", "known once the tokenizer is"))
    rows += column_row(checked.text)
    if data:
        order = BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed)
        rows.append(("token data", f"{data.data_dir} (ready)"))
        rows += text_rows(data)
        rows.append(("steps per epoch", f"{order.windows_per_epoch / batch:,.1f}"))
        rows.append(("epochs", f"{order.epoch(steps, batch):,.2f} at most"))
    else:
        rows.append(("token data", "to be prepared first"))
    if checked.also:
        rows.append(("scored too", ", ".join(checked.also)))
    rows.append(("files", FILES + (" adapter/" if config.lora.rank else "")))
    return rows


def _family(config: Config) -> str:
    """The model's family and which programs can load it, in words."""
    family = saved_type(config.model)
    if FAMILIES[family].architecture:
        return f"{family}, which transformers can load"
    return f"{family}, which only gptray can load: these choices match no family in transformers"


def _workers(config: Config) -> str:
    kind = "GPU" if config.compute.use_gpu else "CPU"
    shared = ", each with its share of the weights (fsdp)" if shards_weights(config) else ""
    scorer = ", plus one that scores" if config.train.async_validation else ""
    workers = f"{config.compute.min_workers:,}"
    if config.compute.is_elastic:
        workers += f" to {config.compute.max_workers:,}, depending on room"
    return f"{workers} ({kind}){shared}{scorer}"


def _passes(config: Config) -> str:
    micro = config.micro_batch_size
    if config.compute.is_elastic:
        return f"{micro:,} x {config.micro_batches} passes, shared among the workers"
    passes = config.grad_accum_steps
    return f"{micro:,} x {passes:,} {'pass' if passes == 1 else 'passes'} a worker"


def _peak_rate(config: Config) -> str:
    """The highest learning rate: optim.lr, unless the training ends in its warm-up."""
    lr, warmup, steps = config.optim.lr, config.optim.warmup_steps, config.train.max_steps
    if warmup < steps:
        return f"{lr:g}"
    return f"{lr * steps / (warmup + 1):.3g}: training ends in its warm-up of {warmup:,} steps"
