"""One worker's side of a run: the model, optimizer and batch order, built or taken up again."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.build import check_backend
from gptray.config import Config, RunFailed
from gptray.data.order import BatchOrder
from gptray.data.shares import split_rows
from gptray.data.tokens import TokenData
from gptray.model import kernels
from gptray.model.gpt import GPT
from gptray.model.hf import load_weights
from gptray.model.memory import keep_freed_memory
from gptray.model.precision import enable_fast_fp32, pick_dtype
from gptray.model.shape import model_folder
from gptray.record import versions, write_event
from gptray.training.checkpoint import (
    TrainerState,
    checkpoint_folder,
    checkpoint_step,
    newest_whole,
    publish_model,
)
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

    def micro_batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        """This worker's part of the step's global batch: inputs and targets, (B, T) each."""
        size, block_size = self.config.micro_batch_size, self.config.train.block_size
        starts = self.order.batch(self.state.step, self.config.train.global_batch_size)
        first = (micro_step * self.workers.size + self.workers.rank) * size
        windows = [
            torch.from_numpy(self.data.train.slice(start, start + block_size + 1))
            for start in starts[first : first + size].tolist()
        ]
        tokens = torch.stack(windows).to(self.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def seed_dropout(self) -> None:
        """Make dropout a function of (seed, step, rank): a resumed run needs no random state."""
        key = f"{self.config.seed}/{self.state.step}/{self.workers.rank}".encode()
        digest = hashlib.blake2b(key, digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))


def start(
    config: Config, data: TokenData, run_dir: Path, *, workers: Workers, device: torch.device
) -> Run:
    """Build a worker's run, from the newest whole checkpoint where there is one.

    Raises:
        RunFailed: checkpoints exist and none is whole.
        ValueError: the training split is shorter than one block.
    """
    make_repeatable()
    step = workers.number_from_first(lambda: _resume_step(run_dir), device)
    folder = checkpoint_folder(run_dir, step) if step else None
    model = build_model(
        config, data, folder, device, tell=lambda text: write_event(run_dir, "notice", message=text)
    )
    optimizer = make_optimizer(model.parameters(), config.optim)
    state = TrainerState(step=0, progress=Progress(), data=data.fingerprint)
    if folder:
        state = TrainerState.load(folder)
        load_optimizer(folder / "optimizer.safetensors", model, optimizer)
    if workers.is_first:
        if folder and state.progress.best_step == step:
            publish_model(folder, run_dir)  # a kill may have come between save and publish
        write_event(
            run_dir,
            "start",
            step=step,
            workers=workers.size,
            dtype=str(model.compute_dtype).removeprefix("torch."),
            backend="native" if model.is_native else "torch",
            parameters=model.num_params,
            pid=os.getpid(),
            device=device_name(device),
            versions=versions(),
            text=dict(split_rows(data.manifest)),
            warnings=data.manifest["warnings"],
        )
    compiled = torch.compile(model) if config.train.compile else model
    return Run(
        config=config,
        data=data,
        run_dir=run_dir,
        workers=workers,
        device=device,
        model=model,
        loss_model=workers.parallel(compiled),  # type: ignore[arg-type]
        optimizer=optimizer,
        order=BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed),
        state=state,
    )


def device_name(device: torch.device) -> str:
    """What a worker computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} processor, {threads} thread" + ("s" if threads > 1 else "")


@contextmanager
def writing(run_dir: Path, *, wait_s: float = 60.0) -> Iterator[None]:
    """Be the only process that writes to a run folder.

    A worker whose driver was killed may live on for some seconds; its successor waits for it.

    Raises:
        RunFailed: another process has held the folder for `wait_s` seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".writer.lock").open("w") as file:
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
    folder, problems = newest_whole(run_dir)
    step = checkpoint_step(folder) or 0 if folder else 0
    for problem in problems:
        write_event(run_dir, "damaged", message=f"{problem}; going back to step {step}")
    return step


def make_repeatable() -> None:
    """Have torch compute the same bits for the same shape, on a GPU too."""
    torch.use_deterministic_algorithms(True)
    # That would also fill every new tensor, which helps to find bugs and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    enable_fast_fp32()
    keep_freed_memory()


def build_model(
    config: Config,
    data: TokenData,
    checkpoint: Path | None,
    device: torch.device,
    *,
    tell: Callable[[str], None] = log.warning,
) -> GPT:
    """The run's model as a checkpoint holds it; None: as training begins with it.

    tell: takes word of kernels that should be there and cannot be built.
    """
    model = GPT(config.model, vocab_size=data.vocab_size)
    if checkpoint:
        load_weights(model, checkpoint / "model")
    elif config.model.init_from:
        model.valid_vocab_size = config.model.vocab_size or data.vocab_size
        load_weights(model, model_folder(config.model.init_from))
        model.valid_vocab_size = data.vocab_size
    else:
        model.initialise(config.seed)
    model.compute_dtype = pick_dtype(config.train.precision, device)
    if model.compute_dtype == torch.bfloat16 and _has_kernels(config.train.backend, device, tell):
        model.use_kernels()
    return model.to(device)


def _has_kernels(backend: str, device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether `train.backend` means the project's own kernels here; builds them.

    Raises:
        UserError: it says native, and they cannot be had.
        RunFailed: it says native, and the compiler does not take them.
    """
    if check_backend(kernels.KEY, backend, use_gpu=device.type != "cpu") == "torch":
        return False
    try:
        kernels.library()
    except RunFailed as error:
        if backend == "native":
            raise
        tell(f"training through PyTorch: {error}")
        return False
    return True
