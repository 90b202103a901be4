"""Profiles a step: kernel launches, waits and copies, and how long the GPU is busy."""

from __future__ import annotations

from collections.abc import Callable

from gpu_parts.bench import Bench
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # and their ...Ex forms
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")


def profiled_step(bench: Bench, step: Callable[[], object]) -> dict[str, float]:
    """Times and counts by name; without a GPU, the number of PyTorch operators.

    ms_merging: of the kernels that merge the chunks of a long context.
    """
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as seen:
        step()
        bench.wait()
    events = seen.events() or []
    if not bench.on_gpu:
        return {"operators": sum(event.name.startswith("aten::") for event in events)}
    on_gpu = [event for event in events if event.device_type.name == "CUDA"]
    return {
        "ms_merging": round(
            sum(event.device_time for event in on_gpu if "merge_kernel" in event.name) / 1e3, 3
        ),
        "ms_GPU_busy": round(sum(event.device_time for event in on_gpu) / 1e3, 3),
        "launches": sum(event.name.startswith(LAUNCHES) for event in events),
        "graph_launches": sum(event.name.startswith("cudaGraphLaunch") for event in events),
        "waits": sum(event.name in WAITS for event in events),
        "copies": sum(event.name in COPIES for event in events),
    }
