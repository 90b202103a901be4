"""One worker's side of a run: the model, optimizer and batch order, new or restored."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.config import Config, RunFailed, UserError
from gptray.data.order import BatchOrder
from gptray.data.shares import split_rows
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData
from gptray.data.vocabulary import kept_rows
from gptray.files import open_lock, storing
from gptray.model.gpt import GPT
from gptray.model.header import check_weights
from gptray.model.hf import Rows, load_weights
from gptray.model.precision import computes_bf16, pick_dtype
from gptray.model.shape import model_folder, read_shape
from gptray.native.abi import load_library
from gptray.native.backend import TRAIN_KEY, check_backend
from gptray.record import versions, write_event
from gptray.training.checkpoint import (
    WRITER_LOCK,
    TrainerState,
    check_not_lost,
    checkpoint_folder,
    checkpoint_step,
    newest_whole,
    publish_model,
)
from gptray.training.device import compiled, compiles, device_name, guard_updates, use_device
from gptray.training.mfu import tokens_per_sec_at_peak
from gptray.training.optim import load_optimizer, make_optimizer
from gptray.training.stopping import Progress
from gptray.training.workers import Workers

log = logging.getLogger("gptray")


@dataclass
class Run:
    """What one worker holds while it trains."""

    config: Config
    data: TokenData
    run_dir: Path
    workers: Workers
    device: torch.device
    model: GPT
    # What computes the loss: the model, compiled and data-parallel as the config says.
    loss_model: nn.Module
    optimizer: torch.optim.Optimizer
    order: BatchOrder
    state: TrainerState
    # On a GPU: 1 once a step's numbers were not finite, as the optimizer's found_inf; None on a
    # CPU, where they are checked before the update.
    spoilt: Tensor | None
    # Tokens per second of all workers at an MFU of 1, where the GPU's peak is known.
    rate_at_peak: float | None

    def micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """A part of the step's global batch by its number: inputs and targets, (B, T) each."""
        size, block_size = self.config.micro_batch_size, self.config.train.block_size
        starts = self.order.batch(self.state.step, self.config.train.global_batch_size)
        first = number * size
        # From pinned memory the GPU copies while the host continues.
        is_pinned = self.device.type == "cuda"
        tokens = torch.empty(size, block_size + 1, dtype=torch.int64, pin_memory=is_pinned)
        windows = starts[first : first + size].tolist()
        for row, start in zip(tokens.numpy(), windows, strict=True):
            row[:] = self.data.train.slice(start, start + block_size + 1)
        tokens = tokens.to(self.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def seed_dropout(self, number: int) -> None:
        """Make dropout a function of (seed, step, number of the micro-batch).

        So a resumed run needs no random state, and the number of workers changes nothing.
        """
        key = f"{self.config.seed}/{self.state.step}/{number}".encode()
        digest = hashlib.blake2b(key, digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))


def start(
    config: Config, data: TokenData, run_dir: Path, *, workers: Workers, device: torch.device
) -> Run:
    """Build a worker's run, from the newest intact checkpoint if there is one.

    Raises:
        UserError: the checkpoints were removed; no working GPU, or no compiler.
        RunFailed: no checkpoint is intact, or the disk is full.
        ValueError: the training split is shorter than one block.
    """
    use_device(config, device)
    first = workers.from_first(lambda: _resume_step(run_dir))
    step = workers.number_from_first(lambda: first or 0, device)
    folder = checkpoint_folder(run_dir, step) if step else None

    def tell(text: str) -> None:
        if workers.is_first:
            write_event(run_dir, "notice", message=text)

    failure: UserError | RunFailed | None = None
    try:
        is_compiled = compiles(config, device)
        model, optimizer = _built(config, data, folder, device, tell)
    except (UserError, RunFailed) as error:
        failure = error
    workers.agree(failure)
    state = TrainerState(step=0, progress=Progress(), data=data.fingerprint)
    if folder:
        state = TrainerState.load(folder)

    step_model = compiled(model, device, tell) if is_compiled else model
    run = Run(
        config=config,
        data=data,
        run_dir=run_dir,
        workers=workers,
        device=device,
        model=model,
        loss_model=workers.parallel(step_model),
        optimizer=optimizer,
        order=BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed),
        state=state,
        spoilt=guard_updates(optimizer, device),
        rate_at_peak=tokens_per_sec_at_peak(
            config,
            model.num_params,
            model.compute_dtype,
            device_name(device),
            workers=workers.size,
        ),
    )

    def begin() -> None:
        if folder and state.progress.best_step == step:
            publish_model(folder, run_dir)  # a kill may have come between save and publish
        _write_start(run, compiled=is_compiled)

    workers.from_first(begin)
    return run


def _write_start(run: Run, *, compiled: bool) -> None:
    """Record how a run starts or resumes."""
    model, data = run.model, run.data
    write_event(
        run.run_dir,
        "start",
        step=run.state.step,
        workers=run.workers.size,
        dtype=str(model.compute_dtype).removeprefix("torch."),
        backend="native" if model.is_native else "torch",
        compiled=compiled,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        parameters=model.num_params,
        pid=os.getpid(),
        device=device_name(run.device),
        versions=versions(),
        **({"loses": data.loses} if data.loses else {}),
        text=dict(split_rows(data.manifest)),
        warnings=data.manifest["warnings"],
    )


def _built(
    config: Config,
    data: TokenData,
    checkpoint: Path | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> tuple[GPT, torch.optim.Optimizer]:
    """The model and its optimizer, from a checkpoint or as training begins."""
    model = build_model(config, data, checkpoint, device, tell=tell)
    optimizer = make_optimizer(model.parameters(), config.optim)
    if checkpoint:
        load_optimizer(checkpoint / "optimizer.safetensors", model, optimizer)
    return model, optimizer


@contextmanager
def writing(run_dir: Path, *, wait_s: float = 60.0) -> Iterator[None]:
    """Be the only process that writes to a run folder.

    A worker whose driver was killed may run on for some seconds; its successor waits for it.

    Raises:
        RunFailed: another process has held the folder for `wait_s` seconds, or the disk is full.
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
    folder, problems = newest_whole(run_dir)
    step = checkpoint_step(folder) or 0 if folder else 0
    for problem in problems:
        write_event(run_dir, "damaged", message=f"{problem}; going back to step {step}")
    return step


def build_model(
    config: Config,
    data: TokenData,
    checkpoint: Path | None,
    device: torch.device,
    *,
    tell: Callable[[str], None] = log.warning,
) -> GPT:
    """The run's model, from a checkpoint; None: as training begins.

    tell: receives notices, of a resized embedding or of kernels that fail to build.
    """
    if config.model.init_from and not checkpoint:
        folder = model_folder(config.model.init_from)
        check_weights(folder, read_shape(folder))
    model = GPT(config.model, vocab_size=data.vocab_size)
    if checkpoint:
        load_weights(model, checkpoint / "model")
    elif config.model.init_from and config.model.resize_vocab:
        _load_resized(model, config, data, config.model.init_from, tell)
    elif config.model.init_from:
        model.valid_vocab_size = config.model.vocab_size or data.vocab_size
        load_weights(model, model_folder(config.model.init_from))
        model.valid_vocab_size = data.vocab_size
    else:
        model.initialise(config.seed)
    model.compute_dtype = pick_dtype(config.train.precision, device)
    if config.train.precision == "auto" and device.type == "cuda" and not computes_bf16(device):
        tell(f"training in fp32: {device_name(device)} does not compute in bf16")
    if model.compute_dtype == torch.bfloat16 and _has_kernels(config.train.backend, device, tell):
        model.use_kernels()
    return model.to(device)


def _load_resized(
    model: GPT, config: Config, data: TokenData, source: str, tell: Callable[[str], None]
) -> None:
    """Load weights; each row of the embedding goes to the same token's new id."""
    own = Tokenizer.load(source)
    kept = kept_rows(own, data.tokenizer)
    folder = model_folder(source)
    rows = read_shape(folder)["vocab_size"]
    kept = [row if row < rows else -1 for row in kept]
    load_weights(model, folder, rows=Rows(kept, min(rows, own.vocab_size), config.seed))
    new, moved = kept.count(-1), sum(row not in (-1, number) for number, row in enumerate(kept))
    if new or moved:
        tell(
            f"the embedding has a row for each of the tokenizer's {len(kept):,} tokens: "
            f"{len(kept) - new:,} taken from {source}, {moved:,} of them from another id; {new:,} "
            "new ones start from the mean row"
        )


def _has_kernels(backend: str, device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether `train.backend` selects the project's own kernels here; builds them.

    Raises:
        UserError: it is native, and this machine cannot run them.
        RunFailed: it is native, and they fail to compile.
    """
    if check_backend(TRAIN_KEY, backend, use_gpu=device.type != "cpu") == "torch":
        return False
    try:
        load_library(key=TRAIN_KEY)
    except RunFailed as error:
        if backend == "native":
            raise
        tell(f"training through PyTorch: {error}")
        return False
    return True
