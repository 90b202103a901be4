"""Logs what a job is doing while nothing else is logged, so that it is never silent for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptray.wording import time_words

log = logging.getLogger("gptray")
# After this many quiet seconds a line says what the job is doing; how often to check.
QUIET_S, POLL_S = 8.0, 0.5
# `extra` of lines about waiting for resources, whose code decides itself when to repeat them.
OF_WAIT = {"is_of_wait": True}


class _LastLine(logging.Filter):
    """Records when the last line was logged, and whether it was about a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.is_of_wait = time.monotonic(), False

    def filter(self, record: logging.LogRecord) -> bool:
        self.at, self.is_of_wait = time.monotonic(), getattr(record, "is_of_wait", False)
        return True


# For all lines, so that a block knows how long it was quiet before it began.
_heard = _LastLine()
log.addFilter(_heard)
# The running blocks of `telling`; only the last, the innermost, logs.
_blocks: list[_LastLine] = []


@contextmanager
def doing(words: str) -> Iterator[None]:
    """In the block, log what is being done and for how long, whenever nothing else is logged."""
    began = time.monotonic()
    with telling(lambda: so_far(words, began)):
        yield


def so_far(words: str, began: float) -> str:
    """`words` with the time since `began`, a time of the monotonic clock."""
    return f"{words}, {time_words(time.monotonic() - began)} so far"


@contextmanager
def telling(line: Callable[[], str | None]) -> Iterator[None]:
    """In the block, log `line()`, unless None, whenever nothing was logged for QUIET_S."""
    heard = _LastLine()
    heard.at = _heard.at

    def look() -> None:
        is_quiet = time.monotonic() - heard.at >= QUIET_S
        if is_quiet and not heard.is_of_wait and _blocks[-1] is heard and (text := line()):
            log.info("%s", text)

    log.addFilter(heard)
    _blocks.append(heard)
    try:
        with following(look, every_s=POLL_S):
            yield
    finally:
        _blocks.remove(heard)
        log.removeFilter(heard)


@contextmanager
def following(look: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Call `look` from a thread every `every_s` seconds while the block runs."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(every_s):
            look()

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
