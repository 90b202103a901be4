"""Checks whether the native library works on this machine; if not, PyTorch computes."""

from __future__ import annotations

from gptray.config import UserError
from gptray.native.build import why_no_cache
from gptray.native.compiler import why_no_library
from gptray.native.processor import why_not_here

TRAIN_KEY, GENERATE_KEY = "train.backend", "generate.backend"


def why_not_native(*, use_gpu: bool, look_at_cache: bool = False) -> str | None:
    """Why the native library cannot compute here; None if it can.

    look_at_cache: also require that the cache folder holds the library or can take it.
    """
    missing = "it runs on CPUs, but compute.use_gpu=true" if use_gpu else None
    missing = missing or why_not_here() or why_no_library()
    if look_at_cache:
        missing = missing or why_no_cache()
    return missing


def check_native(key: str, backend: str, *, use_gpu: bool, look_at_cache: bool = False) -> None:
    """Refuse backend=native if `why_not_native` has a reason.

    Raises:
        UserError: names the key, and what is missing.
    """
    if backend != "native":
        return
    if missing := why_not_native(use_gpu=use_gpu, look_at_cache=look_at_cache):
        raise UserError(
            f"{key}=native: {missing}; {key}=auto uses PyTorch where native is not available, "
            f"{key}=torch everywhere"
        )
