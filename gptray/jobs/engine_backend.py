"""What is known of the backend of a job's engines before any of them runs."""

from __future__ import annotations

from pathlib import Path

from gptray.config import Config
from gptray.jobs.doing import doing
from gptray.model.no_graphs import why_no_graphs
from gptray.model.shape import read_shape
from gptray.native.backend import GENERATE_KEY, check_native
from gptray.native.build import build_library


def check_engine_backend(config: Config) -> None:
    """Refuse generate.backend=native where it is not available. Raises UserError."""
    backend, use_gpu = config.generate.backend, config.compute.use_gpu
    check_native(GENERATE_KEY, backend, use_gpu=use_gpu, look_at_cache=True)


def build_engine_backend(config: Config) -> None:
    """Build the native library, if it is asked for. Raises RunFailed where that fails."""
    if config.generate.backend == "native":
        with doing("building the C++ kernels"):
            build_library(key=GENERATE_KEY)


def planned_backend(config: Config, model_dir: Path) -> str:
    """What a plan says of the backend."""
    if config.generate.backend != "auto":
        return config.generate.backend
    if config.compute.use_gpu:
        if why := why_no_graphs(read_shape(model_dir)):
            return f"torch, since {why}"
        return "auto: CUDA graphs, if their kernels compile"
    return "auto: native or PyTorch, whichever is faster where the engines run"
