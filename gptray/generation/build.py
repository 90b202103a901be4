"""Which code generates on this machine: `native.cpp`, built for it, or PyTorch."""

from __future__ import annotations

from pathlib import Path

from gptray.build import built, check_backend

KEY = "generate.backend"
SOURCE = Path(__file__).with_name("native.cpp")


def pick_backend(backend: str, *, use_gpu: bool) -> str:
    """The backend for `generate.backend` auto | native | torch: native where this machine has it.

    Raises:
        UserError: native was asked for and is not there; says what is missing.
    """
    return check_backend(KEY, backend, use_gpu=use_gpu, source=SOURCE)


def library() -> Path:
    """The native decoder's file; takes some seconds the first time on a machine.

    Raises:
        RunFailed: the compiler does not take the source; with what it says.
    """
    return built(SOURCE, key=KEY)
