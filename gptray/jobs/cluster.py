"""Ray itself: join the cluster that this process belongs to, or start one here, quietly."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from gptray.config import ComputeConfig, Config, RunFailed, UserError
from gptray.files import cannot_write, is_of_files
from gptray.gpus import BUILT_FOR_CPUS, is_torch_for_cpus, local_gpus
from gptray.hub import first_line
from gptray.jobs.address import check_address
from gptray.jobs.own_ray import own_ray, shut_down
from gptray.native.backend import check_backend
from gptray.native.compiler import cannot_compile, why_not_compile

# Read by Ray Train in driver, controller and workers. It polls every two seconds by itself, which
# makes a report wait as long; a poll every 0.2 seconds takes some percent of two cores away from
# training, one every second hardly any. The watcher and the metrics cost seconds at every start.
TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# Read by Ray Serve's controller and proxy where the cluster is the job's own. The controller looks
# ten times a second by itself, which takes 3 % of a core. By gRPC an update of a stream costs the
# proxy and the replica a fifth less than by Ray's own way between them. Around Serve's proxy is
# `gptray.jobs.serve.proxy`.
SERVE_ENV = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gptray.jobs.serve.proxy:middlewares",
}

# Logs and sockets of a session; with less room than this Ray's processes do not come up.
_RAY_NEEDS = 4 << 20


@contextmanager
def ray_cluster(environment: Mapping[str, str] | None = None) -> Iterator[bool]:
    """Have Ray for the time of a job: the cluster in RAY_ADDRESS, else one on this machine.

    A Ray that the process is connected to already is used and left as it is. Gives whether the
    cluster is the job's own, which ends with it.

    environment: variables for the processes of the job's own Ray.
    """
    if _is_connected():
        yield False
        return
    if os.environ.get("RAY_ADDRESS"):
        check_address(os.environ["RAY_ADDRESS"])
    for key, value in (TRAIN_ENV | SERVE_ENV).items():
        os.environ.setdefault(key, value)
    verbose = logging.getLogger("gptray").isEnabledFor(logging.DEBUG)
    level = logging.INFO if verbose else logging.ERROR
    options = {"log_to_driver": verbose, "logging_level": level}
    # Ray prints what it has to say of processes that died, and stdout is for a job's result.
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        with warnings.catch_warnings(), _sigterm_kept():
            warnings.simplefilter("default" if verbose else "ignore")
            if os.environ.get("RAY_ADDRESS"):
                import ray

                with ray_answers():
                    ray.init(**options)
                stack.callback(shut_down)
            else:
                with _ray_folder():
                    stack.enter_context(own_ray(environment or {}, **options))
        yield not os.environ.get("RAY_ADDRESS")


def _is_connected() -> bool:
    """Whether this process is connected to a Ray, without importing ray, which reads os.environ."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _ray_folder() -> Iterator[None]:
    """Say which folder it is when Ray cannot write its session's files. Raises RunFailed."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    try:
        with ray_answers():
            yield
    except Exception as error:
        if is_of_files(error):
            failure = cannot_write(folder, error)
        elif shutil.disk_usage(folder).free < _RAY_NEEDS:
            # Ray's own processes died, and do not say why.
            failure = cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        else:
            raise
        message = f"Ray did not start: {failure}; RAY_TMPDIR names another folder"
        raise RunFailed(message) from error


@contextmanager
def ray_answers() -> Iterator[None]:
    """Say in one sentence that Ray timed out or is gone. Raises RunFailed."""
    try:
        yield
    except (TimeoutError, ConnectionError) as error:
        if is_of_files(error):
            raise
        raise RunFailed(
            f"Ray does not answer: {first_line(error)}; the same command resumes once it does"
        ) from error


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the process's SIGTERM handler: Ray's own aborts the process after three seconds."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def check_training(config: Config) -> None:
    """Refuse a training that this machine cannot run, see `check_resources`."""
    # What auto means is decided by the worker, on its own machine.
    if config.train.backend == "native" and not os.environ.get("RAY_ADDRESS"):
        check_backend("train.backend", "native", use_gpu=config.compute.use_gpu)
    check_resources(
        config.compute,
        compiling=config.train.compiles(on_gpu=config.compute.use_gpu),
        beside="train.async_validation" if config.train.async_validation else None,
    )


def check_resources(
    compute: ComputeConfig, *, compiling: bool = False, beside: str | None = None
) -> None:
    """Refuse what this machine can never give; a cluster (RAY_ADDRESS) may still grow.

    compiling: whether train.compile has the training step compiled.
    beside: the key that asks for one more worker than compute.num_workers, if one does.

    Raises:
        UserError: names the key, what was asked and what there is.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    gpus = local_gpus() if compute.use_gpu else 0
    cpus = len(os.sched_getaffinity(0))
    problems = []
    if compute.use_gpu and gpus < compute.num_workers:
        problems.append(
            f"compute.use_gpu=true with compute.num_workers={compute.num_workers} needs as many "
            f"GPUs; this machine has {gpus}"
        )
    elif compute.use_gpu and is_torch_for_cpus():
        problems.append(BUILT_FOR_CPUS)
    if compute.cpus_per_worker and compute.cpus_per_worker * compute.num_workers > cpus:
        problems.append(
            f"compute.cpus_per_worker={compute.cpus_per_worker} x "
            f"compute.num_workers={compute.num_workers} is more than this machine's {cpus} cores"
        )
    count, cores = compute.num_workers + 1, compute.cpus_per_worker or 1
    has_spare = _gpu_workers(compute, gpus) >= count and cores * count <= cpus
    if beside and not problems and not has_spare:
        spare = f"{count} GPUs" if compute.use_gpu else f"{cores * count} cores"
        problems.append(
            f"{beside}=true needs one worker more than "
            f"compute.num_workers={compute.num_workers}, so {spare}; this machine has "
            f"{gpus if compute.use_gpu else cpus}. Without it ({beside}=false) the workers "
            "themselves score, to the same numbers"
        )
    missing = why_not_compile(on_gpu=compute.use_gpu) if compiling else None
    if missing:
        problems.append(cannot_compile(missing))
    if problems:
        raise UserError("\n".join(problems))


def worker_resources(compute: ComputeConfig, *, spare: int = 0) -> dict[str, float]:
    """What Ray reserves for each worker: its GPU, and its share of the cores.

    `spare` workers more than compute.num_workers have to fit. On a machine with fewer cores
    than workers each gets an equal fraction.
    """
    import ray

    gpu = {"GPU": compute.gpus_per_worker} if compute.use_gpu else {}
    if compute.cpus_per_worker:
        return {"CPU": float(compute.cpus_per_worker), **gpu}
    workers = compute.num_workers + spare
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = cores_that_fit(compute, nodes, workers)
    if cores:
        return {"CPU": float(cores), **gpu}
    if os.environ.get("RAY_ADDRESS"):
        return {"CPU": 1.0, **gpu}  # the cluster's autoscaler is to bring the rest
    return {"CPU": sum(node.get("CPU", 0.0) for node in nodes) / workers, **gpu}


def cores_that_fit(
    compute: ComputeConfig, nodes: Sequence[Mapping[str, float]], workers: int
) -> int:
    """The most whole cores with which all workers fit on the nodes; 0: not even with one.

    nodes: the CPU and GPU of each. A worker with a GPU needs both on one node, and takes no more
    cores than its part of the node's GPUs.
    """
    most = 0.0
    for node in nodes:
        places = _gpu_workers(compute, node.get("GPU", 0.0))
        if places:
            most = max(most, node.get("CPU", 0.0) / (places if compute.use_gpu else 1))
    for cores in range(int(most), 0, -1):
        if _room(compute, nodes, cores) >= workers:
            return cores
    return 0


def _room(compute: ComputeConfig, nodes: Sequence[Mapping[str, float]], cores: int) -> int:
    """How many workers of so many cores fit on the nodes, with their GPUs."""
    return int(
        sum(
            min(node.get("CPU", 0.0) // cores, _gpu_workers(compute, node.get("GPU", 0.0)))
            for node in nodes
        )
    )


def trial_resources(
    compute: ComputeConfig, *, trials: int, at_once: int | None
) -> tuple[int, dict[str, float]]:
    """How many trials of a sweep run at a time, and what Ray reserves for each worker of one.

    Null `at_once`: as many as fit with a core (and its part of a GPU) for each worker. They share
    the cores out; more than fit on this machine would only wait.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = _room(compute, nodes, compute.cpus_per_worker or 1) // compute.num_workers
    if most == 0:
        return at_once or 1, worker_resources(compute)
    grows = bool(os.environ.get("RAY_ADDRESS"))
    number = at_once if at_once and grows else min(trials, most, at_once or most)
    workers = number * compute.num_workers
    cpus = compute.cpus_per_worker or cores_that_fit(compute, nodes, workers) or 1
    gpu = {"GPU": compute.gpus_per_worker} if compute.use_gpu else {}
    return number, {"CPU": float(cpus), **gpu}


def _gpu_workers(compute: ComputeConfig, gpus: float) -> float:
    """How many workers fit on a node's GPUs."""
    return int(gpus / compute.gpus_per_worker + 1e-9) if compute.use_gpu else float("inf")
