"""The backend that all engines of a bulk job use: chosen once, on a machine that runs engines."""

from __future__ import annotations

import logging

import ray
import torch

from gptray.config import Config, ModelConfig, RunFailed
from gptray.generation.step_timing import faster_decoder
from gptray.hub import first_line
from gptray.jobs.doing import doing
from gptray.jobs.resources import Resources, labelled_nodes
from gptray.jobs.tasks import Failure, attempt, result_of
from gptray.native.measured import Choice

log = logging.getLogger("gptray")


def chosen_backend(config: Config, shape: ModelConfig, reserved: Resources) -> str:
    """The backend that generate.backend=auto means on CPUs for a network of a shape; says why.

    reserved: what an engine takes. Where engines may run on other machines than this one, that is
    waited for, since the other may be of another kind.
    Raises UserError for a precision that the machine lacks, RunFailed where the actor dies.
    """
    threads = max(1, int(reserved["CPU"]))
    with doing("choosing between the native kernels and PyTorch"):
        if _all_run_here(config):
            outcome = Chooser().choose(config, shape, threads)
        else:
            outcome = _chosen_elsewhere(config, shape, threads, reserved)
    choice = result_of(outcome)
    log.info("%s", choice.why)
    return choice.backend


class Chooser:
    """Times the backends in its process; an actor, for which a wait for room is told."""

    def choose(self, config: Config, shape: ModelConfig, threads: int) -> Choice | Failure:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            size = config.generate.max_batch_size
            adapts = config.generate.adapters is not None
            return attempt(
                lambda: faster_decoder(config, shape, max_batch_size=size, takes_adapters=adapts)
            )
        finally:
            torch.set_num_threads(before)


def _all_run_here(config: Config) -> bool:
    """Whether this machine is the only one on which engines may run now."""
    nodes = [node.id for node in labelled_nodes(config.compute)]
    return nodes == [ray.get_runtime_context().get_node_id()]


def _chosen_elsewhere(
    config: Config, shape: ModelConfig, threads: int, reserved: Resources
) -> Choice | Failure:
    most = config.compute.max_failures
    asked = ray.remote(Chooser).options(
        num_cpus=reserved["CPU"],
        label_selector=config.compute.selector,
        max_restarts=most,
        max_task_retries=most,
    )
    actor = asked.remote()
    try:
        outcome: Choice | Failure = ray.get(actor.choose.remote(config, shape, threads))
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"choosing generate.backend failed: {first_line(error)}; name native or torch"
        ) from None
    finally:
        ray.kill(actor)
    return outcome
