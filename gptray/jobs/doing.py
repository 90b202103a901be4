"""What a job is doing while it has nothing else to say: a line every few seconds, no silence."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptray.wording import time_words

log = logging.getLogger("gptray")
# Seconds without a line of the job's after which one says what it is doing; between two looks.
QUIET_S, POLL_S = 8.0, 0.5
# `extra` of the line of a job that waits for room, which knows itself when to say so again.
OF_WAIT = {"is_of_wait": True}


class _Heard(logging.Filter):
    """When the last line was logged, and whether it is about a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.is_of_wait = time.monotonic(), False

    def filter(self, record: logging.LogRecord) -> bool:
        self.at, self.is_of_wait = time.monotonic(), getattr(record, "is_of_wait", False)
        return True


# Of all lines, so that a block knows how long it was quiet before.
_heard = _Heard()
log.addFilter(_heard)
# Of the blocks of `telling` that run; the last, which is the innermost, speaks.
_blocks: list[_Heard] = []


@contextmanager
def doing(words: str) -> Iterator[None]:
    """Say in the block what is being done, and since when, whenever nothing else is said."""
    began = time.monotonic()
    with telling(lambda: so_far(words, began)):
        yield


def so_far(words: str, began: float) -> str:
    """Words for what began at a time of the monotonic clock."""
    return f"{words}, {time_words(time.monotonic() - began)} so far"


@contextmanager
def telling(line: Callable[[], str | None]) -> Iterator[None]:
    """Log `line()`, unless it is None, whenever nothing was logged for QUIET_S in the block."""
    heard = _Heard()
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
    """Call `look` every so many seconds, from a thread, while the block runs."""
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
