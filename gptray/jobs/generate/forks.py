"""Refuses an `LLM` in a forked process: OpenMP would wait for threads that the fork left behind."""

from __future__ import annotations

import os

from gptray.config import UserError

# The processes that have opened a model: this one, and those that it was forked from.
_OPENED_IN: set[int] = set()


def note_opening() -> None:
    """Note that this process opens a model. Raises like `check_not_forked`."""
    check_not_forked()
    _OPENED_IN.add(os.getpid())


def check_not_forked() -> None:
    """Raise UserError in a process forked from one that has opened a model."""
    if _OPENED_IN and os.getpid() not in _OPENED_IN:
        raise UserError(
            "a process forked from one that has opened an LLM cannot run one: start processes by "
            "multiprocessing's spawn, and open an LLM in each"
        )
