"""A Ray Train worker, which runs the training loop."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import ray.train
import ray.train.collective
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gptray.config import RunFailed, UserError
from gptray.data.tokens import DamagedData, TokenData
from gptray.jobs.cluster.ray_metrics import Exporter, run_tag
from gptray.jobs.cluster.shared_storage import check_seen
from gptray.jobs.train.node_run import RunOnNode, run_on_node
from gptray.jobs.train.notices import Notices
from gptray.jobs.train.samples import sample_texts
from gptray.jobs.train.task import TrainTask
from gptray.jobs.train.validate import Validations
from gptray.model.gpu_faults import check_gpu
from gptray.system import on_mac
from gptray.training.evaluations import Metrics
from gptray.training.loop import failed, fit
from gptray.training.workers import Workers

TIMEOUT = timedelta(minutes=30)  # of the workers' process group


def train_worker(task: TrainTask, ray_dir: Path) -> Metrics:
    """Run the loop; return its result and the `peak_memory_bytes` of this process.

    ray_dir: the run folder that Ray Train knows.
    """
    torch.set_num_threads(task.threads)
    context, step = ray.train.get_context(), 0
    with process_group():
        try:
            with run_on_node(
                task,
                fetches=context.get_local_rank() == 0,
                is_on_first_node=context.get_node_rank() == 0,
            ) as run:
                result = _trained(run, ray_dir)
                step = result["step"]
        except (UserError, RunFailed) as error:  # from fetching the run, or sending its last rows
            result = failed(step, error)
    return {**result, "peak_memory_bytes": peak_memory(ray.train.torch.get_device())}


def _trained(run: RunOnNode, ray_dir: Path) -> Metrics:
    """Run the loop; return its result. Raises UserError or RunFailed on every worker."""
    task, config, workers = run.task, run.task.config, Workers.current()
    data = workers.all_or_none(lambda: _opened(task))

    def report(metrics: dict[str, object], checkpoint_dir: Path | None) -> None:
        # The loop has written the checkpoint into the run's folder already.
        run.send()
        checkpoint = checkpoint_dir and ray.train.Checkpoint(str(ray_dir / checkpoint_dir.name))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=config.train.async_validation and checkpoint_dir is not None,
        )

    with Notices(task) as notices:
        result = fit(
            config,
            data,
            task.run_dir,
            report=report,
            sample=lambda model: sample_texts(config, data, model),
            device=ray.train.torch.get_device(),
            timed=Exporter(run_tag(task.run_dir)).laps if workers.is_first else None,
            validated=Validations(task.run_dir, config).wait
            if config.train.async_validation
            else None,
            request=notices.request,
            fetch=run.fetch,
        )
    if result["stopped"] == "left":
        notices.tell_of_leaving(result["step"])
    return result


def _opened(task: TrainTask) -> TokenData:
    """The run's tokens, on a node that can train. Raises UserError, RunFailed."""
    check_seen(task.data_dir, storage_path=task.config.storage_path)
    if task.config.compute.use_gpu:
        check_gpu()
    try:
        return task.tokens()
    except DamagedData as error:  # another attempt would find the same damage
        raise RunFailed(f"{error}; the same command prepares the text again") from None


def peak_memory(device: torch.device) -> int:
    """This process's peak memory in bytes: on its GPU or, on CPUs, its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if on_mac() else peak * 1024  # Linux reports KiB


@contextmanager
def process_group() -> Iterator[None]:
    """Join torch.distributed's process group of all workers; a single worker needs none.

    Ray's own torch backend does this for GPUs (nccl), but it imports torch in the driver and then
    in the controller, which takes four of a start's twenty seconds.

    The group is destroyed only if the block succeeds: after one worker fails, the others might wait
    for it, and Ray ends their processes anyway.
    """
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1 or dist.is_initialized():
        yield
        return
    store = _store(rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()


def _store(rank: int, size: int) -> TCPStore:
    """The group's key-value store, on the first worker's node, at a free port."""
    if rank == 0:
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # By default it would listen on all of the node's interfaces.
        listener = socket.create_server((host, 0), family=family)
        store = TCPStore(
            host,
            listener.getsockname()[1],
            size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        ray.train.collective.broadcast_from_rank_zero((host, store.port))
        return store
    host, port = ray.train.collective.broadcast_from_rank_zero(None)
    return TCPStore(host, port, size, is_master=False, timeout=TIMEOUT)
