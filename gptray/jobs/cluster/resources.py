"""The cluster resources that a job's workers reserve: cores and a GPU on the same node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gptray.config import ComputeConfig, UserError
from gptray.jobs.cluster.autoscaler import NodeType, grows, node_types, types_words
from gptray.jobs.cluster.cluster_nodes import (
    Node,
    Resources,
    alive_nodes,
    amount_words,
    has_labels,
    labels_words,
    nodes_words,
)
from gptray.jobs.cluster.holders import held_by_command
from gptray.jobs.cluster.machine import gpu_workers
from gptray.jobs.cluster.own_ray import is_own_ray

# A worker's cores on a cluster that others use too, unless compute.cpus_per_worker says otherwise.
MODERATE = 4


def worker_resources(
    compute: ComputeConfig, *, spare: int = 0, together: bool = False
) -> dict[str, float]:
    """The resources that Ray reserves for each worker: its GPU and its share of the cores.

    spare: how many more workers than compute.num_workers must fit.
    together: whether all workers (the minimum, if elastic) must run at the same time; otherwise any
    number is useful. Raises UserError if the cluster could not provide this even if idle.
    """
    nodes = labelled_nodes(compute)
    has = [node.resources for node in nodes]
    least, most = compute.min_workers + spare, compute.max_workers + spare
    places = min(most, room(compute, has, compute.cpus_per_worker or 1))
    if places < least and _shares_cores(compute, has, least):
        return _reserved(compute, sum(one.get("CPU", 0.0) for one in has) / least)
    if places >= least or (places and not together):
        return _reserved(compute, _cores_taken(compute, cores_that_fit(compute, has, places)))
    return _reserved(compute, _cores_to_come(compute, nodes, least if together else 1))


def labelled_nodes(compute: ComputeConfig) -> list[Node]:
    """The nodes on which workers may run, minus what the job's own command holds there.

    Raises UserError, listing the nodes' labels, if there is none and none can be added.
    """
    where, held = held_by_command()  # it ends only after the workers
    nodes = [
        replace(node, resources={k: v - held.get(k, 0.0) for k, v in node.resources.items()})
        if node.id == where
        else node
        for node in alive_nodes()
    ]
    found = [node for node in nodes if has_labels(node, compute.selector)]
    if nodes and not found and not grows():
        wanted = ", ".join(f"{name}={value}" for name, value in compute.selector.items())
        keys = [*(["compute.label_selector"] if compute.label_selector else [])]
        keys += ["compute.accelerator_type"] if compute.accelerator_type else []
        raise UserError(
            f"no node of the cluster has the label{'s' * (len(compute.selector) > 1)} {wanted}: "
            f"{labels_words(nodes)}. Change {' or '.join(keys)}, or add nodes"
        )
    return found


def check_cluster(compute: ComputeConfig, *, spare: int = 0) -> None:
    """Raise UserError for workers that can never run at the same time on the cluster."""
    worker_resources(compute, spare=spare, together=True)


def _shares_cores(compute: ComputeConfig, has: Sequence[Resources], workers: int) -> bool:
    """Whether workers may each get a fraction of a core, as on the only node of a cluster."""
    offering = [node for node in has if node.get("CPU")]
    if compute.cpus_per_worker or len(offering) != 1:
        return False
    if gpu_workers(compute, offering[0].get("GPU", 0.0)) < workers:
        return False
    return is_own_ray() or not grows()


def _reserved(compute: ComputeConfig, cores: float) -> dict[str, float]:
    gpu = {"GPU": compute.gpus_per_worker} if compute.use_gpu else {}
    return {"CPU": float(cores), **gpu}


def actor_options(compute: ComputeConfig, reserved: Resources) -> dict[str, Any]:
    """Ray's options for an actor or a task of a worker."""
    return {
        "num_cpus": reserved["CPU"],
        "num_gpus": reserved.get("GPU", 0),
        "label_selector": compute.selector,
    }


def _cores_taken(compute: ComputeConfig, cores: int) -> int:
    """How many cores a worker takes, given how many it could have; 0: none fit."""
    if compute.cpus_per_worker or compute.use_gpu or is_own_ray():
        return cores
    return min(cores, MODERATE)


def cores_that_fit(compute: ComputeConfig, nodes: Sequence[Resources], workers: int) -> int:
    """The most whole cores per worker with which all fit on the nodes; 0: not even one.

    nodes: the CPU and GPU of each. A worker needs its cores and GPU on one node, and takes no more
    than the cores' share for its GPU. If set, compute.cpus_per_worker is returned if it fits.
    """
    if compute.cpus_per_worker:
        fits = room(compute, nodes, compute.cpus_per_worker) >= workers
        return compute.cpus_per_worker if fits else 0
    most = 0.0
    for node in nodes:
        places = gpu_workers(compute, node.get("GPU", 0.0))
        if places:
            most = max(most, node.get("CPU", 0.0) / (places if compute.use_gpu else 1))
    for cores in range(int(most), 0, -1):
        if room(compute, nodes, cores) >= workers:
            return cores
    return 0


def room(compute: ComputeConfig, nodes: Sequence[Resources], cores: float) -> int:
    """How many workers with this many cores, and their GPUs, fit on the nodes."""
    return int(
        sum(
            min(node.get("CPU", 0.0) // cores, gpu_workers(compute, node.get("GPU", 0.0)))
            for node in nodes
        )
    )


def _cores_to_come(compute: ComputeConfig, nodes: Sequence[Node], workers: int) -> int:
    """A worker's cores on a cluster that has room only once its autoscaler adds nodes.

    Raises UserError if it can never have room.
    """
    cores, types = compute.cpus_per_worker or 1, node_types()
    if types is None:
        return cores
    most = [one.resources for one in nodes if one.is_head or not types]
    for resources, number in types:
        most += [resources] * (workers if number is None else min(number, workers))
    fitting = cores_that_fit(compute, most, workers)
    if not fitting:
        raise UserError(misfit(compute, nodes, types, workers=workers, cores=cores))
    return _cores_taken(compute, fitting)


def misfit(
    compute: ComputeConfig,
    nodes: Sequence[Node],
    types: Sequence[NodeType],
    *,
    workers: int,
    cores: int,
) -> str:
    """The message that the workers fit neither on the nodes nor on those that may be added."""
    worker = amount_words(_reserved(compute, cores))
    if workers == 1:
        needs = f"a worker needs {worker} on one node, which no node of the cluster has"
    else:
        needs = f"{workers} workers at the same time need {worker} each, on one node for each; "
        needs += "the cluster has no room for them even when idle"
    keys = [
        *(["compute.num_workers"] if workers > 1 else []),
        *(["compute.cpus_per_worker"] if compute.cpus_per_worker else []),
        *(["compute.use_gpu"] if compute.use_gpu else []),
    ]
    may_come = f" Its autoscaler may add {types_words(types)}." if types else ""
    change = f" Change {' or '.join(keys)}, or add nodes." if keys else " Add nodes."
    return f"{needs}: {nodes_words(nodes) or 'no node is alive'}.{may_come}{change}"


def trial_resources(
    compute: ComputeConfig, *, trials: int, at_once: int | None
) -> tuple[int, dict[str, float]]:
    """How many trials of a sweep run at a time, and what Ray reserves for each of their workers.

    at_once: None for as many as fit with a core (and share of a GPU) for each worker, which then
    divide up all cores. If an autoscaler may add nodes, all trials start: those without room wait
    and make it add nodes.
    """
    has = [node.resources for node in labelled_nodes(compute)]
    if not is_own_ray() and grows():
        return min(trials, at_once or trials), worker_resources(compute, together=True)
    most = room(compute, has, compute.cpus_per_worker or 1) // compute.max_workers
    if most == 0:
        return at_once or 1, worker_resources(compute, together=True)
    number = min(trials, most, at_once or most)
    cores = cores_that_fit(compute, has, number * compute.max_workers)
    return number, _reserved(compute, _cores_taken(compute, cores))
