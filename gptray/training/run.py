"""One worker's state of a run: the model, optimizer and batch order, new or restored."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.config import Config, RunFailed
from gptray.data.order import BatchOrder
from gptray.data.shares import split_rows
from gptray.data.tokens import TokenData
from gptray.model.adapter import Base
from gptray.model.gpt import GPT
from gptray.native.measured import Choice
from gptray.native.processor import processor_name
from gptray.storage.files import open_lock, storing
from gptray.storage.record import versions, write_event
from gptray.training.averaging import Average
from gptray.training.building import agreed_base, build_model
from gptray.training.checkpoint import (
    WRITER_LOCK,
    check_not_lost,
    checkpoint_folder,
    checkpoint_step,
    newest_intact,
)
from gptray.training.device import compiled, compiles, device_name, use_device
from gptray.training.global_batch import GlobalBatch
from gptray.training.journal import Journal
from gptray.training.kernel_choice import agree_on_backend
from gptray.training.laps import Laps
from gptray.training.mfu import tokens_per_sec_at_peak
from gptray.training.optim import AdamW, learning_rate, load_optimizer, make_optimizer
from gptray.training.publishing import publish_best
from gptray.training.sharding import ShardedWorkers, shard
from gptray.training.stopping import EarlyStopping
from gptray.training.teaching import Teachers
from gptray.training.trainer_state import TrainerState
from gptray.training.workers import Workers


@dataclass
class Run:
    """What one worker holds while it trains."""

    config: Config
    data: TokenData
    run_dir: Path
    workers: Workers
    device: torch.device
    model: GPT
    # The model wrapped to compute the loss: compiled and data-parallel, as the config says.
    loss_model: nn.Module
    optimizer: AdamW
    order: BatchOrder
    state: TrainerState
    # Steps that are launched before one's numbers are read: 1 on a GPU, which then never waits.
    lag: int
    # Tokens per second of all workers at an MFU of 1, if the GPU's peak is known.
    peak_rate: float | None
    # With train.ema.
    average: Average | None
    # With lora.rank.
    base: Base | None
    # With train.teachers.
    teachers: Teachers | None
    laps: Laps = field(default_factory=Laps)
    # Copies a checkpoint to this worker's node.
    fetch: Callable[[Path], None] = lambda checkpoint: None
    # Only the first worker has one.
    journal: Journal | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        optim, landing = self.config.optim, self.state.landing
        step = landing.back_to if landing else self.state.step
        lr = learning_rate(step, self.config.train.max_steps, optim)
        if not landing:
            return lr
        # A landing from a step of the warm-up may start below final_lr.
        return landing.learning_rate(self.state.step, lr=lr, min_lr=min(lr, optim.final_lr))

    @property
    def batch(self) -> GlobalBatch:
        """The global batch of the next update."""
        return GlobalBatch(self.config, self.data, self.order, self.state.position)

    def losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch's (B, T) loss to minimise, and its loss on the text alone, detached."""
        if self.teachers is None:
            loss: Tensor = self.loss_model(idx, targets)
            return loss, loss.detach()
        both: Tensor = self.loss_model(idx, targets, self.teachers.soft_targets(idx))
        return both[0], both[1].detach()

    def publish_if_best(self, step: int) -> None:
        """Publish a step's model, or its average, as the run's if it is the best so far.

        Raises RunFailed.
        """
        best = self.state.progress
        if best.best_step == step:
            folder = checkpoint_folder(self.run_dir, step)
            publish_best(folder, self.run_dir, self.data, self.base, averaged=best.averaged)

    def seed_dropout(self, number: int) -> None:
        """Make dropout a function of (seed, updates so far, number of the micro-batch).

        So a resumed run needs no saved random state, and the number of workers does not matter.
        """
        key = f"{self.config.seed}/{self.state.position}/{number}".encode()
        digest = hashlib.blake2b(key, digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))


def start(
    config: Config, data: TokenData, run_dir: Path, *, workers: Workers, device: torch.device
) -> Run:
    """Build a worker's run, from the newest intact checkpoint if there is one.

    Raises UserError if the checkpoints were removed, or if there is no working GPU or compiler;
    RunFailed if no checkpoint is intact or the disk is full; ValueError if the training split is
    shorter than one block.
    """
    use_device(config, device)
    step = workers.shared_from_first(lambda: _resume_step(run_dir))
    folder = checkpoint_folder(run_dir, step) if step else None

    def tell(text: str) -> None:
        if workers.is_first:
            write_event(run_dir, "notice", message=text)

    is_compiled = workers.all_or_none(lambda: compiles(config, device))
    choice = agree_on_backend(config, run_dir, workers, device, tell)
    native = choice.backend == "native"
    model = workers.all_or_none(
        lambda: build_model(config, data, folder, device, native=native, tell=tell)
    )
    optimizer, workers = _place(model, config, folder, workers, device, compiled=is_compiled)
    new = TrainerState(step=0, progress=EarlyStopping(), data=data.fingerprint)
    state = TrainerState.load(folder) if folder else new
    step_model: nn.Module = model
    if is_compiled:
        in_parts = workers.size > 1 or config.model.checkpoint_blocks or bool(config.train.teachers)
        step_model = compiled(model, device, tell, in_parts=in_parts)
    run = Run(
        config=config,
        data=data,
        run_dir=run_dir,
        workers=workers,
        device=device,
        model=model,
        loss_model=workers.parallel(step_model, config.compute.reduce_dtype),
        optimizer=optimizer,
        order=BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed),
        state=state,
        lag=1 if device.type == "cuda" else 0,
        peak_rate=tokens_per_sec_at_peak(
            config, model.num_params, model.compute_dtype, device_name(device), workers=workers.size
        ),
        average=workers.all_or_none(lambda: Average.of(model, config, folder)),
        base=agreed_base(config, workers, device),
        teachers=workers.all_or_none(lambda: _teachers(model, config, device)),
    )

    def begin() -> None:
        if folder:  # a kill may have struck between saving and publishing
            run.publish_if_best(step)
        _write_start(run, choice, compiled=is_compiled)

    workers.from_first(begin)
    return run


def _write_start(run: Run, choice: Choice, *, compiled: bool) -> None:
    """Record how a run starts or resumes."""
    model, data = run.model, run.data
    write_event(
        run.run_dir,
        "start",
        step=run.state.step,
        workers=run.workers.size,
        dtype=str(model.compute_dtype).removeprefix("torch."),
        backend="native" if model.is_native else "torch",
        chosen=choice.why,
        compiled=compiled,
        sharded=isinstance(run.workers, ShardedWorkers),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        parameters=model.num_params,
        trained=sum(one.numel() for one in model.parameters() if one.requires_grad),
        pid=os.getpid(),
        device=device_name(run.device),
        processor=processor_name(),
        versions=versions(),
        **({"loses": data.loses} if data.loses else {}),
        **({"teachers": run.teachers.sha256} if run.teachers else {}),
        text=dict(split_rows(data.manifest)),
        also_data={name: one.fingerprint for name, one in data.also.items()},
        warnings=data.manifest["warnings"],
        **({"until": run.state.landing.end} if run.state.landing else {}),
    )


def _place(
    model: GPT,
    config: Config,
    checkpoint: Path | None,
    workers: Workers,
    device: torch.device,
    *,
    compiled: bool,
) -> tuple[AdamW, Workers]:
    """Put the model on its device, sharded if asked for; return its optimizer and workers."""
    compute = config.compute
    is_sharded = compute.strategy == "fsdp" and workers.size > 1
    if is_sharded:
        shard(model, device, reduce_dtype=compute.reduce_dtype, compiled=compiled)
    else:
        model.to(device)
    optimizer = make_optimizer(model.parameters(), config.optim)
    if checkpoint:
        path = checkpoint / "optimizer.safetensors"
        workers.all_or_none(lambda: load_optimizer(path, model, optimizer))
    if is_sharded:
        workers = ShardedWorkers(workers.rank, workers.size, model, optimizer, device)
        model.full_tensor = workers.full_tensor
    return optimizer, workers


def _teachers(model: GPT, config: Config, device: torch.device) -> Teachers | None:
    if not config.train.teachers:
        return None
    vocab_size, dtype = model.valid_vocab_size, model.compute_dtype
    return Teachers(config.train, vocab_size=vocab_size, dtype=dtype, device=device)


@contextmanager
def writing(run_dir: Path, *, wait_s: float = 60.0) -> Iterator[None]:
    """Hold the lock that lets only one process write to a run folder.

    A worker whose driver was killed may run for some more seconds; its successor waits for it.
    Raises RunFailed if another process holds the lock for `wait_s` seconds, or the disk is full.
    """
    path = run_dir / WRITER_LOCK
    with storing(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = open_lock(path)
    with opened as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunFailed(f"another process is writing to {run_dir}") from None
                time.sleep(0.1)
        yield


def _resume_step(run_dir: Path) -> int:
    check_not_lost(run_dir)
    folder, problems = newest_intact(run_dir)
    step = checkpoint_step(folder) or 0 if folder else 0
    for problem in problems:
        write_event(run_dir, "damaged", message=f"{problem}; going back to step {step}")
    return step
