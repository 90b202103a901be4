"""The backend that all engines of a bulk job use: chosen once, on a machine that runs engines."""

from __future__ import annotations

import logging

import ray
import torch

from gptray.config import Config, ModelConfig, RunFailed
from gptray.generation.step_timing import faster_decoder
from gptray.hub import first_line
from gptray.jobs.doing import doing
from gptray.jobs.resources import Resources
from gptray.jobs.tasks import Failure, attempt, result_of
from gptray.native.measured import Choice

log = logging.getLogger("gptray")


def chosen_backend(config: Config, shape: ModelConfig, reserved: Resources) -> str:
    """The backend that generate.backend=auto means on CPUs for a network of a shape; says why.

    Waits for the resources of an engine, since the driver's machine may be of another kind.
    Raises UserError for a precision that the machine lacks, RunFailed where the task dies.
    """
    task = ray.remote(_choose).options(
        num_cpus=reserved["CPU"], label_selector=config.compute.selector
    )
    call = task.remote(config, shape, max(1, int(reserved["CPU"])))
    try:
        with doing("choosing between the native kernels and PyTorch"):
            choice: Choice = result_of(ray.get(call))
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"choosing generate.backend failed: {first_line(error)}; set it to native or torch"
        ) from None
    log.info("%s", choice.why)
    return choice.backend


def _choose(config: Config, shape: ModelConfig, threads: int) -> Choice | Failure:
    torch.set_num_threads(threads)
    size = config.generate.max_batch_size
    return attempt(lambda: faster_decoder(config, shape, max_batch_size=size))
