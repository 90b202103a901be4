"""Finds out which backend is faster on this machine: times each kind of work and remembers it.

A kind of work is everything that its speed depends on: processor, threads, shape and versions. A
file in the user's cache folder holds its seconds; a damaged file is replaced. A virtual machine
cannot see who else uses its host, and one bad minute there can make the slower backend look faster.
So a first measurement counts for an hour. The next job then measures again, and once two in a row
find the same backend, the answer stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from gptray.native.build import library_name
from gptray.native.core_sharing import queued_ns
from gptray.native.processor import processor_identity, processor_name
from gptray.storage.files import cache_folder, open_lock, replacing
from gptray.storage.stored import Unreadable, read_object

log = logging.getLogger("gptray")

NAMES = {"native": "the native kernels", "torch": "PyTorch"}
# PyTorch is chosen only if it is faster by this factor: less may be noise, of which there is more
# if threads wait for cores.
MARGIN, BUSY_MARGIN = 1.05, 2.0
# The share of a step that threads may wait for cores on a quiet machine.
BUSY = 0.1
# Seconds for which an unconfirmed measurement counts.
UNCONFIRMED_S = 3600.0
# Rounds of each backend, of which the best counts; no round begins after MEASURE_S seconds.
ROUNDS, MEASURE_S = 20, 1.5
# Seconds to wait for another process that is measuring.
WAIT_S, POLL_S = 10.0, 0.05

Step = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """A backend, native or torch, and one sentence that says why it was chosen."""

    backend: str
    why: str


def pytorch_since(key: str, reason: object) -> Choice:
    """The choice of PyTorch if the native library cannot compute."""
    return Choice("torch", f"{key}: PyTorch, because {reason}")


@dataclass(frozen=True)
class Measured:
    """The fastest step of each backend, in seconds; a backend that failed is missing.

    busy: other processes kept the cores busy. until: when the measurement expires, in seconds since
    the epoch; None: never.
    """

    seconds: Mapping[str, float]
    busy: bool = False
    until: float | None = None

    @property
    def faster(self) -> str:
        """The backend to choose: native if PyTorch's gain is below the margin."""
        native, pytorch = (self.seconds.get(name, math.inf) for name in ("native", "torch"))
        margin = BUSY_MARGIN if self.busy else MARGIN
        return "torch" if pytorch * margin < native else "native"

    @property
    def outdated(self) -> bool:
        return self.until is not None and time.time() >= self.until


def faster(
    key: str, what: str, work: Mapping[str, object], makers: Mapping[str, Callable[[], Step]]
) -> Choice:
    """The faster backend for a kind of work; native if PyTorch gains less than MARGIN.

    what: the work, for the message. work: all that its speed depends on besides processor and
    versions. makers: for native and torch, a function that makes a step to time. A backend that
    fails is logged and not chosen. Measuring takes up to two seconds, a remembered answer none.
    """
    assert set(makers) == set(NAMES)
    asked = {
        **work,
        "processor": processor_identity(),
        "versions": [version("torch"), library_name()],
    }

    def measure(before: Measured | None) -> Measured:
        found = _measure(key, makers)
        if before and before.faster == found.faster and not found.busy:
            return found
        return replace(found, until=time.time() + UNCONFIRMED_S)

    return _choice(key, what, remembered(asked, set(NAMES), measure))


def remembered(
    asked: Mapping[str, object],
    names: Set[str],
    measure: Callable[[Measured | None], Measured],
) -> Measured:
    """The seconds of all `names`, remembered from an earlier job or from `measure`.

    asked: everything that they depend on. measure: takes the expired measurement, if any.
    """
    path = _folder() / f"{_digest(asked)}.json"
    kept = _read(path, names)
    if kept and not kept.outdated:
        return kept
    with _measuring_lock():  # two that measure at the same time would disturb each other
        kept = _read(path, names)
        if kept and not kept.outdated:
            return kept
        measured = measure(kept)
        if set(measured.seconds) == names:  # a backend that failed may work next time
            _write(path, asked, measured)
        return measured


def _choice(key: str, what: str, measured: Measured) -> Choice:
    seconds, chosen = measured.seconds, measured.faster
    other = "native" if chosen == "torch" else "torch"
    if other not in seconds:
        return Choice(chosen, f"{key}: {NAMES[chosen]}, because {NAMES[other]} failed in a trial")
    times = [f"{1e3 * seconds[name]:,.4g}" for name in (chosen, other)]
    busy = "; other processes kept the cores busy" if measured.busy else ""
    return Choice(
        chosen,
        f"{key}: {NAMES[chosen]}, {seconds[other] / seconds[chosen]:.2f}x as fast as "
        f"{NAMES[other]} on this processor, {processor_name()} ({' against '.join(times)} ms for "
        f"{what}{busy})",
    )


def _measure(key: str, makers: Mapping[str, Callable[[], Step]]) -> Measured:
    """Time the backends in turns."""
    steps = dict[str, Step]()
    for name, make in makers.items():
        try:
            step = make()
            step()  # the first step may load libraries, or even build one
        except Exception as error:  # whatever it is, the other backend may still work
            log.warning("%s: %s failed in a trial: %s", key, NAMES[name], error)
        else:
            steps[name] = step
    best, began = dict.fromkeys(steps, (math.inf, False)), time.perf_counter()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            best[name] = min(best[name], _timed(step))
        if time.perf_counter() - began > MEASURE_S:
            break
    seconds = {name: seconds for name, (seconds, _) in best.items()}
    return Measured(seconds, busy=any(is_busy for _, is_busy in best.values()))


def _timed(step: Step) -> tuple[float, bool]:
    """The seconds of a step, and whether its threads waited for cores."""
    queued, began = queued_ns(), time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return seconds, queued_ns() - queued > BUSY * seconds * 1e9


def _digest(asked: Mapping[str, object]) -> str:
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _folder() -> Path:
    return cache_folder() / "backends"


def _read(path: Path, names: Set[str]) -> Measured | None:
    """The measurement in a file; None if there is no valid one."""
    try:
        record = read_object(path)
    except (OSError, Unreadable):
        return None
    seconds, busy, until = (record.get(name) for name in ("seconds", "busy", "until"))
    if not isinstance(seconds, dict) or set(seconds) != names:
        return None
    if not all(isinstance(value, float) and value > 0 for value in seconds.values()):
        return None
    if not isinstance(busy, bool) or not (until is None or isinstance(until, float)):
        return None
    return Measured(seconds, busy, until)


def _write(path: Path, asked: Mapping[str, object], measured: Measured) -> None:
    """Write a measurement to its file."""
    record = {"processor": processor_name(), "work": asked, **asdict(measured)}
    try:
        with replacing(path) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    except OSError as error:
        log.info("cannot write %s (%s); the next job will measure again", path, error.strerror)


@contextmanager
def _measuring_lock() -> Iterator[None]:
    """Keep other processes from measuring, if the cache folder allows, for at most WAIT_S."""
    try:
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open_lock(_folder() / ".lock")
    except OSError:  # `_write` logs it
        yield
        return
    with file:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
        yield
