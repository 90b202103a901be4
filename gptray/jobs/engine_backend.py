"""The backend of a job's engines: picked for this machine, and built."""

from __future__ import annotations

import logging
from pathlib import Path

from gptray.config import Config, ModelConfig, RunFailed
from gptray.jobs.doing import doing
from gptray.model.only_torch import check_kernels
from gptray.model.shape import read_shape
from gptray.native.backend import GENERATE_KEY, pick_backend
from gptray.native.build import build_library

log = logging.getLogger("gptray")


def with_backend(config: Config, model_dir: Path | None) -> Config:
    """The config with the backend that `auto` means here, for all engines of the job.

    model_dir: the folder of the job's model, where it is known. On GPUs `auto` stays: whether an
    engine can record CUDA graphs shows where it runs. Raises UserError if the backend that is asked
    for is not available, or cannot compute the model.
    """
    if model_dir is not None:
        network, asked = ModelConfig(**read_shape(model_dir)), config.generate.backend
        why = check_kernels(network, asked, key=GENERATE_KEY)
        if why:
            if asked == "auto":
                log.info("%s: PyTorch, since %s", GENERATE_KEY, why)
            settings = config.generate.model_copy(update={"backend": "torch"})
            return config.model_copy(update={"generate": settings})
    if config.compute.use_gpu and config.generate.backend == "auto":
        return config
    backend = pick_backend(config.generate.backend, use_gpu=config.compute.use_gpu)
    settings = config.generate.model_copy(update={"backend": backend})
    return config.model_copy(update={"generate": settings})


def with_built_backend(asked: Config, picked: Config) -> Config:
    """Build the library of the backend that `with_backend` picked; fall back from auto to PyTorch.

    Raises RunFailed if generate.backend=native was asked for and cannot be built.
    """
    if picked.generate.backend != "native":
        return picked
    try:
        with doing("building the C++ kernels"):
            build_library(key=GENERATE_KEY)
    except RunFailed as error:
        if asked.generate.backend == "native":
            raise
        log.warning("generate.backend: PyTorch, since %s", error)
        settings = picked.generate.model_copy(update={"backend": "torch"})
        return picked.model_copy(update={"generate": settings})
    return picked
