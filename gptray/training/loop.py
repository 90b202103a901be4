"""The training loop of one worker. It uses torch.distributed but knows nothing of Ray.

It talks to its caller through functions: `report(metrics, checkpoint_dir)` and, if checkpoints are
scored elsewhere, `validated(step)`. So the same loop runs in a Ray Train worker, in a Tune trial
and in a test.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.config import Config, RunFailed, UserError
from gptray.config.errors import WorkerFailed
from gptray.data.scoring import charge_per_token
from gptray.data.tokens import TokenData
from gptray.model.gpt import GPT
from gptray.model.gpu_faults import out_of_gpu_memory
from gptray.training.evaluations import (
    AsyncEvaluation,
    BlockingEvaluation,
    Evaluations,
    Metrics,
    Report,
    Samples,
    Validation,
    evaluate_base,
    save,
)
from gptray.training.journal import Journal
from gptray.training.laps import Timed
from gptray.training.numbers import Action, StepNumbers
from gptray.training.optim import set_rates, weight_decay
from gptray.training.rewind import begin_landing
from gptray.training.run import Run, start, writing
from gptray.training.sharding import is_sharded
from gptray.training.stopping import NonFiniteLoss
from gptray.training.workers import Workers


def fit(
    config: Config,
    data: TokenData,
    run_dir: Path,
    *,
    report: Report,
    sample: Callable[[GPT], Samples],
    device: torch.device,
    validated: Callable[[int], Validation] | None = None,
    timed: Timed | None = None,
    request: Callable[[], Action] = lambda: Action.NONE,
    fetch: Callable[[Path], None] = lambda checkpoint: None,
) -> Metrics:
    """Train until `max_steps`, until validation loss stops falling or a worker asks to leave.

    With `optim.schedule=wsd`, the run then lands, see `gptray.training.landing`.
    Resumes from the newest intact checkpoint of `run_dir`. Every worker calls this; only the first
    writes, samples and passes checkpoints to `report`.

    validated: without it, training waits for evaluations. With it, whoever receives a report scores
    its checkpoint, and every worker calls `validated(step)` to wait for the result.
    timed: receives the time of each part of a step, at every logged row.
    request: called at every step; if one worker asks to save, or to save and leave, all do.
    fetch: copies a checkpoint to this worker's node before it is read, if nodes share no disk.

    Returns the metrics of the last logged step and `stopped`, why training (or the stable part of
    a run that landed) ended: max_steps, patience, left, non_finite with a `message`, or failed with
    a `message` and whether it is the user's `mistake`. A failure is shared by all workers and
    returned rather than raised, since Ray Train would take an exception for a dead worker and
    restart it. Raises WorkerFailed if there are several workers and a GPU runs out of memory.
    """
    workers = Workers.current()
    step = 0
    with ExitStack() as stack:
        try:
            workers.from_first(lambda: stack.enter_context(writing(run_dir)))
            run = start(config, data, run_dir, workers=workers, device=device)
            step = run.state.step
            run.fetch, run.laps.tell = fetch, timed
            evaluate_base(run)
            journal = workers.from_first(lambda: stack.enter_context(Journal(run_dir, step=step)))
            run.journal = journal
            evaluations: Evaluations
            if validated:
                evaluations = AsyncEvaluation(run, report, validated)
            else:
                evaluations = BlockingEvaluation(run, report, sample)
            return train(run, evaluations, request)
        except NonFiniteLoss as error:
            return {"step": run.state.step, "stopped": "non_finite", "message": str(error)}
        except (UserError, RunFailed) as error:
            return failed(step, error)
        except torch.OutOfMemoryError as error:
            size = config.micro_batch_size
            failure = out_of_gpu_memory(error, key="train.micro_batch_size", size=size)
            if workers.size > 1:
                raise WorkerFailed(str(failure)) from None
            return failed(step, failure)


def failed(step: int, error: UserError | RunFailed) -> Metrics:
    """The result of a run that failed with `error` at or after `step`."""
    mistake = isinstance(error, UserError)
    return {"step": step, "stopped": "failed", "message": str(error), "mistake": mistake}


def train(run: Run, evaluations: Evaluations, request: Callable[[], Action]) -> Metrics:
    """Train to the end of the run; return the last logged row and why training stopped.

    Raises NonFiniteLoss on every worker; every checkpoint that is left has a finite score.
    """
    result = train_phase(run, evaluations, request)
    if result["stopped"] != "left" and not run.state.is_over(run.config):
        begin_landing(run, result["stopped"])
        result = train_phase(run, evaluations, request)
    return result


def train_phase(run: Run, evaluations: Evaluations, request: Callable[[], Action]) -> Metrics:
    """Run training steps to the end of the current phase: the whole run, unless it lands.

    Returns and raises like `train`. On a GPU, a step's numbers are read while the next step runs,
    or at once if the step is logged or saved.
    """
    config = run.config
    row: Metrics = {"step": run.state.step}
    losses = list(run.state.losses)  # of the steps since the last row
    unread: deque[StepNumbers] = deque()
    logged, clock = run.state.step, time.perf_counter()
    while not (stopped := run.state.why_stop(config)):
        unread.append(train_step(run, request()))
        evaluates = is_due(run, config.train.eval_interval)
        logs = evaluates or is_due(run, config.train.log_interval)
        requested = Action.NONE
        try:
            while len(unread) > (0 if logs or requested else run.lag):
                numbers = unread.popleft()
                loss, grad_norm, agreed = numbers.read()
                losses.append(loss)
                requested = max(requested, agreed)
        except NonFiniteLoss:
            run.state = replace(run.state, step=numbers.step - 1)  # the last to update the weights
            evaluations.finish()
            raise
        run.laps.end("wait")
        if logs:
            steps = run.state.step - logged
            tokens_per_sec = config.tokens_per_step * steps / (time.perf_counter() - clock)
            row = step_row(run, losses, tokens_per_sec, grad_norm=grad_norm, lr=numbers.lr)
            losses = []
            if evaluates:
                run.state = replace(run.state, evaluated=run.state.step, losses=())
                evaluations.add(row)
            elif run.journal:
                run.journal.write(row)
            run.laps.end("evaluation" if evaluates else "log")
            run.laps.report(steps)
            logged, clock = run.state.step, time.perf_counter()
        if requested:
            if not evaluates:  # an evaluation has just saved a checkpoint
                run.state = replace(run.state, losses=tuple(losses))
                run.workers.from_first(lambda: save(run))
            if requested is Action.LEAVE and not run.state.why_stop(config):
                return {**row, "step": run.state.step, "stopped": "left"}
    evaluations.finish()
    return {**row, "stopped": stopped}


def is_due(run: Run, interval: int) -> bool:
    """Whether it is time for something that happens every `interval` steps and at the last one."""
    return run.state.step % interval == 0 or run.state.step == run.state.last_step(run.config)


def train_step(run: Run, request: Action = Action.NONE) -> StepNumbers:
    """Make one update; return its numbers, which on a GPU may still be in flight.

    If any worker's loss or gradient norm is not finite, neither this step nor a later one updates a
    weight, and reading the numbers raises NonFiniteLoss.
    """
    config, step, lr = run.config, run.state.step + 1, run.learning_rate
    run.model.train()
    loss = accumulate_gradients(run)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.max_grad_norm or math.inf)
    if is_sharded(norm):
        norm = norm.full_tensor()
    requests = [loss.new_full((), float(request is one)) for one in (Action.SAVE, Action.LEAVE)]
    sums = run.workers.sum(torch.stack([loss, *requests]))
    measured = torch.stack([sums[0] / run.workers.size, norm.double(), *sums[1:]])
    run.optimizer.found_inf.logical_or_(~measured.isfinite().all())
    numbers = StepNumbers.send(step, lr, measured)
    decay = weight_decay(run.state.cooled(config), config.optim)
    set_rates(run.optimizer, lr=lr, weight_decay=decay)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state = replace(run.state, step=step)
    if run.average:
        run.average.update(run.state.position)
    run.laps.end("update")
    return numbers


def accumulate_gradients(run: Run) -> Tensor:
    """Run this worker's micro-batches forward and backward; return the sum of their losses, fp64.

    The global batch's micro-batches are dealt out to the workers. If the workers do not divide
    them evenly, some repeat one with zero weight, so that all make the same number of passes.
    Averaged over the workers, losses and gradients are those of the mean over the step's targets.
    """
    workers, batch = run.workers, run.batch
    counts = batch.counts()
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    passes = math.ceil(len(counts) / workers.size)
    for micro_step in range(passes):
        number = micro_step * workers.size + workers.rank
        micro = number % len(counts)
        run.seed_dropout(micro)
        idx, targets = batch.micro_batch(micro, run.device)
        # Weighs the mean loss of a micro-batch by its share of the step's targets.
        divisor = max(sum(counts), 1) / (max(counts[micro], 1) * workers.size)
        run.laps.end("data")
        with workers.gradient_sync(run.loss_model, now=micro_step == passes - 1):
            loss, text_loss = (loss / divisor for loss in run.losses(idx, targets))
            if number >= len(counts):  # another worker has it
                loss, text_loss = loss * 0.0, text_loss * 0.0
            loss.backward()  # type: ignore[no-untyped-call]
        total += text_loss
        run.laps.end("forward_backward")
    return total


def step_row(
    run: Run, losses: list[float], tokens_per_sec: float, *, grad_norm: float, lr: float
) -> Metrics:
    """The row of a logged step: `train_loss` is the mean since the last row, with dropout on.

    It is the loss on the text alone, even with teachers. Like validation loss, it includes the
    charge for text that the tokenizer loses, at the training split's mean. `mfu` is present on GPUs
    whose peak is known, `phase` if the run is to land.
    """
    return {
        "step": run.state.step,
        "epoch": round(run.order.epoch(run.state.position, run.config.train.global_batch_size), 4),
        "train_loss": math.fsum(losses) / len(losses) + charge_per_token(run.data.train),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_sec": round(tokens_per_sec, 1),
        **({"phase": run.state.phase} if run.config.optim.lands else {}),
        **({"mfu": round(tokens_per_sec / run.peak_rate, 4)} if run.peak_rate else {}),
    }
