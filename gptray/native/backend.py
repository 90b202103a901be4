"""Which code computes on this machine: the native library or PyTorch."""

from __future__ import annotations

import logging

from gptray.config import UserError
from gptray.native.build import why_no_cache
from gptray.native.compiler import why_no_library
from gptray.native.processor import why_not_here

log = logging.getLogger("gptray")

TRAIN_KEY, GENERATE_KEY = "train.backend", "generate.backend"


def check_backend(key: str, backend: str, *, use_gpu: bool, look_at_cache: bool = False) -> str:
    """The backend for a key that says auto | native | torch: native where this machine has it.

    look_at_cache: whether the cache folder must have the library, or take it, too.

    Raises:
        UserError: native was asked for and is not available; says what is missing.
    """
    if backend == "torch" or (backend == "auto" and use_gpu):
        return "torch"
    missing = "it runs on CPUs, and compute.use_gpu=true" if use_gpu else None
    missing = missing or why_not_here() or why_no_library()
    if look_at_cache:
        missing = missing or why_no_cache()
    if missing and backend == "native":
        raise UserError(
            f"{key}=native: {missing}; {key}=auto falls back to PyTorch on the machine where the "
            f"job starts, {key}=torch uses it on every node"
        )
    if missing:
        log.info("%s: PyTorch, since %s", key, missing)
    return "torch" if missing else "native"


def pick_backend(backend: str, *, use_gpu: bool) -> str:
    """The backend for `generate.backend` auto | native | torch: native where this machine has it.

    Raises:
        UserError: native was asked for and is not available; says what is missing.
    """
    return check_backend(GENERATE_KEY, backend, use_gpu=use_gpu, look_at_cache=True)
