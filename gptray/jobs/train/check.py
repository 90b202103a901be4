"""What is checked of a training before it starts, by the job, its dry run and sweeps.

Needs neither torch nor ray, so that every mistake is told before anything expensive starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptray.config import Config, UserError
from gptray.data.order import BatchOrder
from gptray.data.tokens import TokenData
from gptray.jobs.cluster import check_training
from gptray.jobs.prepare.run import check_sources, known_tokenizer, prepared
from gptray.jobs.resuming import (
    check_free,
    check_records,
    check_resumable,
    is_finished,
)
from gptray.jobs.run_folder import resolve, run_dir
from gptray.jobs.train.embedding import check_vocabulary
from gptray.jobs.train.samples import check_prompts
from gptray.training.checkpoint import TrainerState, newest_whole


@dataclass(frozen=True)
class CheckedRun:
    """A training that has been looked at. `data`: its tokens, where they are prepared.

    state: where its run stands; None before any checkpoint.
    changes: a sentence for each key that is to change in a run that is there.
    """

    config: Config
    folder: Path
    state: TrainerState | None
    data: TokenData | None
    changes: Sequence[str]


def check_run(config: Config) -> CheckedRun:
    """Resolve the config and find every mistake that can be found without torch and Ray.

    Raises:
        UserError: a mistake in the config, the text or the run folder.
        RunFailed: the run has checkpoints and none is whole.
    """
    config = resolve(config)
    folder = run_dir(config)
    check_training(config)
    check_sources(config)
    check_vocabulary(config)
    check_known_prompts(config)
    changes = check_resumable(config)
    check_free(folder)
    checkpoint, _ = newest_whole(folder)
    state = TrainerState.load(checkpoint) if checkpoint else None
    check_records(folder, state, log_interval=config.train.log_interval)
    data = prepared(config)
    if data and not (state and is_finished(config, folder, state)):
        check_data(config, data, state)
    return CheckedRun(config, folder, state, data, changes)


def check_known_prompts(config: Config) -> None:
    """Refuse prompts that the tokenizer cannot read, where it is known by now. Raises UserError."""
    tokenizer = known_tokenizer(config) if config.sample.prompt else None
    if tokenizer:
        check_prompts(config, tokenizer)


def check_data(config: Config, data: TokenData, state: TrainerState | None) -> None:
    """Refuse token data that cannot be trained on, or that is not what the run of `state` has seen.

    Raises:
        UserError: says which split, tokenizer, prompt or text, and what to change.
    """
    rows = config.model.vocab_size
    if rows is not None and rows < data.vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the {data.vocab_size} entries of the "
            f"tokenizer ({config.data.tokenizer})"
        )
    try:
        BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed)
    except ValueError as error:
        raise UserError(f"training text is too short: {error}; lower train.block_size") from None
    if len(data.val) < 2:
        raise UserError("the validation split has fewer than 2 tokens; change data.split")
    check_prompts(config, data.tokenizer)
    if state and state.data != data.fingerprint:
        raise UserError(
            f"the text or tokenizer of the run {config.name} has changed since it started "
            f"(data {state.data}, now {data.fingerprint}); choose another name"
        )
