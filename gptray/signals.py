"""Ends a job soon after SIGTERM, SIGINT, SIGHUP or the death of Ray, whatever it is waiting for.

The first signal interrupts the job, which then has `STOP_S` to clean up; after that, or on a second
signal, the process ends at once. Run folders and outputs are consistent at any moment, and the
job's own Ray dies with the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# SIGHUP: the terminal was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_S = 8.0
# `timeout` signals its child and then the child's group: signals this close count as one.
REPEAT_S = 1.0


class _Stop:
    """Handles a running job's signals, and knows why and by when the job must stop.

    A thread reads the signals' numbers from Python's wakeup descriptor, so they are noticed even
    while the main thread waits in a library, or after a library has installed its own handler.
    """

    def __init__(self, end: Callable[[str | None, bool], object]) -> None:
        self.failure: str | None = None
        self.limit_s = STOP_S
        self.last_act: Callable[[], object] = lambda: None
        self._end = end
        self._since: float | None = None
        self._is_raised = False
        self._insists = False  # whether to interrupt until the main thread notices
        self._own = 0  # signals sent by `insist` and not read yet
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def handle(self, number: int, frame: object) -> None:
        """Interrupt the job, only once: a second time would interrupt its cleanup."""
        if not self._is_raised:
            self._is_raised = True
            raise KeyboardInterrupt

    def insist(self) -> None:
        """Interrupt the main thread, whatever it is waiting for."""
        self._since = self._since or time.monotonic()
        self._insists = True
        self._own += 1
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGTERM)

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    def _watch(self) -> None:
        while True:
            is_due = self._insists and not self._is_raised
            left = self._left()
            wait = REPEAT_S / 2 if is_due and left else left
            if select.select([self._reader], [], [], wait)[0]:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    os.close(self._reader)
                    return
                for number in numbers:
                    self._count(number)
            elif self._left() == 0:
                self._end_at_once(is_again=False)
            elif is_due:
                self.insist()

    def _left(self) -> float | None:
        """Seconds left for a stopping job; None if it is not stopping."""
        if self._since is None:
            return None
        limit = min(STOP_S, self.limit_s) if self.failure else self.limit_s
        return max(0.0, self._since + limit - time.monotonic())

    def _count(self, number: int) -> None:
        if number == signal.SIGTERM and self._own:
            self._own -= 1
        elif number in SIGNALS and self._since is None:
            self._since = time.monotonic()
            if number == signal.SIGINT and signal.getsignal(number) != self.handle:
                self.insist()  # a library's handler may not interrupt
        elif number in SIGNALS and time.monotonic() - (self._since or 0) > REPEAT_S:
            self._end_at_once(is_again=True)

    def _end_at_once(self, *, is_again: bool) -> None:
        try:
            self.last_act()
        finally:
            self._end(self.failure, is_again)


_stop: _Stop | None = None


@contextmanager
def interrupting(end: Callable[[str | None, bool], object]) -> Iterator[None]:
    """Make these signals raise KeyboardInterrupt in the block; only in the main thread.

    end: ends the process at once. Its arguments are the failure that stops the job, if any, and
        whether a second signal asked for it; if not, the job did not stop within `STOP_S`.
    """
    global _stop
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell may start a background job with SIGINT ignored, and nohup ignores SIGHUP.
    numbers = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    _stop = stop = _Stop(end)
    previous = {one: signal.signal(one, stop.handle) for one in numbers}
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
        stop.close()
        _stop = None


def leaving_within(seconds: float) -> AbstractContextManager[None]:
    """In the block, a job that is stopped has this long to finish open requests."""
    return _stopping_with(limit_s=seconds)


def before_ending_at_once(act: Callable[[], object]) -> AbstractContextManager[None]:
    """In the block, a process that ends without cleanup first does this, in another thread."""
    return _stopping_with(last_act=act)


@contextmanager
def _stopping_with(**changed: object) -> Iterator[None]:
    """Set attributes of the running job's `_Stop` in the block, if a job runs."""
    attributes = vars(_stop) if _stop else {}
    before = {name: attributes.get(name) for name in changed}
    attributes.update(changed)
    try:
        yield
    finally:
        attributes.update(before)


@contextmanager
def sigterm_sets() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, unless a failure interrupts the job."""
    event = threading.Event()

    def handle(number: int, frame: object) -> None:
        if _stop is not None and _stop.failure:
            _stop.handle(number, frame)
        else:
            event.set()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def fail(message: str) -> None:
    """Interrupt the job from another thread for a failure that the main thread does not notice."""
    if _stop is not None:
        _stop.failure = message
        _stop.insist()


def is_handling() -> bool:
    """Whether a job is running that `fail` can interrupt."""
    return _stop is not None


def failure() -> str | None:
    """The failure that interrupted the job; None if a signal or nothing did."""
    return _stop.failure if _stop else None
