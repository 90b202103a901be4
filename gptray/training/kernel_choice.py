"""Chooses a run's backend: the requested one, that of its last start, or the faster one here.

All workers of a run use the same backend; the first worker decides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gptray.config import Config, RunFailed
from gptray.model.precision import pick_dtype
from gptray.native.abi import load_library
from gptray.native.backend import TRAIN_KEY, check_native, why_not_native
from gptray.native.build import cached_library, library_name
from gptray.native.measured import NAMES, Choice, pytorch_since
from gptray.native.processor import processor_name
from gptray.storage.record import Event, read_events, write_event
from gptray.training.block_timing import faster_kernels
from gptray.training.workers import Workers


def agree_on_backend(
    config: Config,
    run_dir: Path,
    workers: Workers,
    device: torch.device,
    tell: Callable[[str], None],
) -> Choice:
    """Resolve `train.backend` for a run. Every worker calls this, and all get the same backend.

    A run keeps its first backend, so its results stay the same bit for bit. tell: receives notices,
    such as that kernels fail to build or that the run resumes on another processor.
    With train.backend=native, raises UserError if a worker's machine cannot run the kernels, and
    RunFailed if they fail to compile. Also raises RunFailed if the run's events are damaged.
    """
    dtype = workers.all_or_none(lambda: pick_dtype(config.train.precision, device))
    workers.from_first(lambda: _tell_of_another_processor(run_dir, device, dtype, tell))
    asked = config.train.backend
    on_gpu = device.type != "cpu"
    if asked == "torch" or dtype != torch.bfloat16 or (on_gpu and asked == "auto"):
        return Choice("torch", "")
    missing = workers.all_or_none(lambda: _why_not(config, run_dir, workers, tell, on_gpu=on_gpu))
    reasons = [reason for reason in workers.gather(missing) if reason]
    if asked == "native":
        return Choice("native", "")
    return workers.shared_from_first(lambda: _choice(config, run_dir, reasons, tell))


def _why_not(
    config: Config, run_dir: Path, workers: Workers, tell: Callable[[str], None], *, on_gpu: bool
) -> str | None:
    """Build the kernels if needed; return why this worker cannot use them, None if it can."""
    asked = config.train.backend
    check_native(TRAIN_KEY, asked, use_gpu=on_gpu)
    if missing := why_not_native(use_gpu=on_gpu):
        return missing
    if workers.is_first and cached_library(library_name()) is None:
        message = "building the C++ kernels, once for this processor"
        write_event(run_dir, "building", message=message)
    try:
        load_library(key=TRAIN_KEY)
    except RunFailed as error:
        if asked == "native":
            raise
        tell(f"training through PyTorch: {error}")
        return "the kernels could not be built"
    return None


def _choice(
    config: Config, run_dir: Path, reasons: list[str], tell: Callable[[str], None]
) -> Choice:
    """The choice for train.backend=auto. reasons: why workers cannot use the kernels."""
    before = _last_start(run_dir)
    was = before["backend"] if before else None
    if reasons:
        choice = pytorch_since(TRAIN_KEY, reasons[0])
        if was == "native":
            tell(
                f"{choice.why}: the run began with the native kernels, so it can no longer match "
                "an uninterrupted run bit for bit"
            )
        return choice
    if was in NAMES:
        return Choice(was, f"{TRAIN_KEY}: {NAMES[was]}, as when this run last started")
    return faster_kernels(config)


def _last_start(run_dir: Path) -> Event | None:
    """The event of a run's last start or resume; None for a new run. Raises RunFailed."""
    starts = [event for event in read_events(run_dir) if event["event"] == "start"]
    return starts[-1] if starts else None


def _tell_of_another_processor(
    run_dir: Path, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]
) -> None:
    """Say that a run resumes on other hardware if that changes its results."""
    before = _last_start(run_dir)
    was, now = before.get("processor") if before else None, processor_name()
    if device.type == "cpu" and was and was != now:
        tell(
            f"resuming on another processor, {now} after {was}: losses may differ in the last "
            "digits from those of an uninterrupted run"
        )
    had, has = before.get("dtype") if before else None, str(dtype).removeprefix("torch.")
    if had and had != has:
        tell(
            f"computing in {has} here but in {had} before: the run can no longer match an "
            "uninterrupted one bit for bit"
        )
