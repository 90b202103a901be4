"""Checks, without Ray, that this machine has what a job on it needs."""

from __future__ import annotations

import os

from gptray.config import ComputeConfig, Config, UserError
from gptray.gpus import built_for_cpus, is_torch_for_cpus, local_gpus
from gptray.native.backend import TRAIN_KEY, check_native
from gptray.native.compiler import cannot_compile, why_not_compile
from gptray.system import on_mac, usable_cores
from gptray.wording import count


def check_training(config: Config) -> None:
    """Raise UserError if this machine or the configured backend cannot run the training.

    Also raises like `check_resources`.
    """
    if not os.environ.get("RAY_ADDRESS"):
        check_native(TRAIN_KEY, config.train.backend, use_gpu=config.compute.use_gpu)
    check_resources(
        config.compute,
        compiling=config.train.compiles(on_gpu=config.compute.use_gpu),
        beside="train.async_validation" if config.train.async_validation else None,
    )


def check_resources(
    compute: ComputeConfig, *, compiling: bool = False, beside: str | None = None
) -> None:
    """Raise UserError for resources that this machine lacks; a cluster (RAY_ADDRESS) may grow.

    compiling: whether the training step is compiled. beside: the key, if any, that needs one more
    worker than compute.num_workers.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    gpus = local_gpus() if compute.use_gpu else 0
    cpus = usable_cores()
    problems = []
    workers, shown = compute.min_workers, compute.workers_shown
    if compute.use_gpu and gpus < workers and not on_mac():
        problems.append(
            f"compute.use_gpu=true with compute.num_workers={shown} needs as many GPUs; this "
            f"machine has {gpus}"
        )
    elif compute.use_gpu and is_torch_for_cpus():
        problems.append(built_for_cpus())
    if compute.cpus_per_worker and compute.cpus_per_worker * workers > cpus:
        problems.append(
            f"compute.cpus_per_worker={compute.cpus_per_worker} x "
            f"compute.num_workers={shown} is more than this machine's {count(cpus, 'core')}"
        )
    number, cores = workers + 1, compute.cpus_per_worker or 1
    has_spare = gpu_workers(compute, gpus) >= number and cores * number <= cpus
    if beside and not problems and not has_spare:
        spare = f"{number} GPUs" if compute.use_gpu else f"{cores * number} cores"
        problems.append(
            f"{beside}=true needs one more worker than compute.num_workers={shown}, so {spare}; "
            f"this machine has {gpus if compute.use_gpu else cpus}. Without it ({beside}=false) "
            "the workers do the scoring themselves, with the same results"
        )
    missing = why_not_compile(on_gpu=compute.use_gpu) if compiling else None
    if missing:
        problems.append(cannot_compile(missing))
    if problems:
        raise UserError("\n".join(problems))


def gpu_workers(compute: ComputeConfig, gpus: float) -> float:
    """How many workers fit on a node's GPUs."""
    return int(gpus / compute.gpus_per_worker + 1e-9) if compute.use_gpu else float("inf")
