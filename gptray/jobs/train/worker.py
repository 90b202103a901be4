"""One Ray Train worker: the training loop, with Ray's report as its only contact."""

from __future__ import annotations

import resource
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from gptray.config import RunFailed, UserError
from gptray.data.tokens import DamagedData, TokenData
from gptray.jobs.ray_metrics import Exporter, run_tag
from gptray.jobs.shared_storage import check_seen
from gptray.jobs.train.group import process_group
from gptray.jobs.train.notices import Notices
from gptray.jobs.train.samples import sample_texts
from gptray.jobs.train.task import TrainTask
from gptray.jobs.train.validate import Validations
from gptray.model.gpu_faults import check_gpu
from gptray.training.evaluations import Metrics
from gptray.training.loop import failed, fit


def train_worker(task: TrainTask) -> Metrics:
    """Run the loop; return its result and the `peak_memory_bytes` of this process."""
    config = task.config
    torch.set_num_threads(task.threads)
    try:
        check_seen(task.data_dir, storage_path=config.storage_path)
        if config.compute.use_gpu:
            check_gpu()
    except UserError as error:
        return failed(0, error)
    try:
        data = TokenData.open(task.data_dir)
    except DamagedData as error:  # not a worker's death: no other attempt would find it whole
        return failed(0, RunFailed(f"{error}; the same command prepares the text again"))

    def report(metrics: dict[str, object], checkpoint_dir: Path | None) -> None:
        # The loop has written the checkpoint into the run's folder already.
        ray.train.report(
            metrics,
            checkpoint=checkpoint_dir and ray.train.Checkpoint(str(checkpoint_dir)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=config.train.async_validation and checkpoint_dir is not None,
        )

    device = ray.train.torch.get_device()
    is_first = ray.train.get_context().get_world_rank() == 0
    with process_group(), Notices(task) as notices:
        result = fit(
            config,
            data,
            task.run_dir,
            report=report,
            sample=lambda model: sample_texts(config, data, model),
            device=device,
            timed=Exporter(run_tag(task.run_dir)).laps if is_first else None,
            validated=Validations(task.run_dir, config).wait
            if config.train.async_validation
            else None,
            wish=notices.wish,
        )
    if result["stopped"] == "left":
        notices.tell_of_leaving(result["step"])
    return {**result, "peak_memory_bytes": peak_memory(device)}


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
