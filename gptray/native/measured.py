"""Which backend is faster on this machine: each is timed once for a kind of work, and remembered.

A kind of work is what its speed depends on: the processor, the threads, the shape, the versions.
Its file in the user's cache folder holds the seconds; one that is damaged is measured again. What
is measured while other processes keep the cores busy counts for an hour.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from gptray.files import cache_folder, open_lock, replacing
from gptray.native.build import library_name
from gptray.native.core_sharing import queued_ns
from gptray.native.processor import processor_identity, processor_name
from gptray.stored import Unreadable, read_object

log = logging.getLogger("gptray")

NAMES = {"native": "the native kernels", "torch": "PyTorch"}
# PyTorch is taken if it is faster by this factor: less is noise, of which there is more where
# threads wait for cores.
MARGIN, BUSY_MARGIN = 1.05, 2.0
# The share of a step that its threads may wait for cores; seconds for which a measurement counts
# that met no better step.
BUSY, BUSY_S = 0.1, 3600.0
# Rounds of each backend, of which the best counts; none begins after so many seconds in all.
ROUNDS, MEASURE_S = 20, 1.5
# Seconds to wait for another process that measures.
WAIT_S, POLL_S = 10.0, 0.05

Step = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """A backend, native or torch, and why it was chosen, in one sentence."""

    backend: str
    why: str


def pytorch_since(key: str, reason: object) -> Choice:
    """PyTorch, where the native library cannot compute."""
    return Choice("torch", f"{key}: PyTorch, because {reason}")


@dataclass(frozen=True)
class Measured:
    """The least seconds of each backend's step; of one that failed, none.

    until: when the measurement no longer counts, since the cores were busy; None: it stays.
    """

    seconds: Mapping[str, float]
    until: float | None = None


def faster(
    key: str, what: str, work: Mapping[str, object], makers: Mapping[str, Callable[[], Step]]
) -> Choice:
    """The faster backend for a kind of work; native where PyTorch gains less than MARGIN.

    what: the work in words. work: all that its speed depends on besides processor and versions.
    makers: for native and torch what makes a step to time. A backend that fails is told of and
    not taken. The first caller on a machine takes up to two seconds, later ones none.
    """
    assert set(makers) == set(NAMES)
    asked = {**work, "processor": processor_identity(), "versions": _versions()}
    return _choice(key, what, measured_once(asked, set(NAMES), lambda: _measure(key, makers)))


def measured_once(
    asked: Mapping[str, object], names: Set[str], measure: Callable[[], Measured]
) -> Measured:
    """The seconds of all `names`, from whoever measured first on this machine, else from `measure`.

    asked: all that they depend on.
    """
    path = _folder() / f"{_digest(asked)}.json"
    measured = _kept(path, names)
    if measured is None:
        with _alone():  # two that measure at the same time would disturb each other
            measured = _kept(path, names)
            if measured is None:
                measured = measure()
                if set(measured.seconds) == names:  # what failed may work the next time
                    _keep(path, asked, measured)
    return measured


def _choice(key: str, what: str, measured: Measured) -> Choice:
    seconds, margin = measured.seconds, BUSY_MARGIN if measured.until else MARGIN
    native, pytorch = (seconds.get(name, math.inf) for name in ("native", "torch"))
    chosen, other = ("torch", "native") if pytorch * margin < native else ("native", "torch")
    if other not in seconds:
        return Choice(chosen, f"{key}: {NAMES[chosen]}, because {NAMES[other]} failed in a trial")
    times = [f"{1e3 * seconds[name]:,.4g}" for name in (chosen, other)]
    busy = "; other processes kept the cores busy" if measured.until else ""
    return Choice(
        chosen,
        f"{key}: {NAMES[chosen]}, {seconds[other] / seconds[chosen]:.2f}x as fast as "
        f"{NAMES[other]} on this processor, {processor_name()} ({' against '.join(times)} ms for "
        f"{what}{busy})",
    )


def _measure(key: str, makers: Mapping[str, Callable[[], Step]]) -> Measured:
    """Time the backends in rounds in which they take turns."""
    began, steps, best = time.perf_counter(), dict[str, Step](), dict[str, tuple[bool, float]]()
    for name, make in makers.items():
        try:
            step = make()
            best[name] = _timed(step)
        except Exception as error:  # whatever it is, the other backend can still do the work
            log.warning("%s: %s failed in a trial: %s", key, NAMES[name], error)
        else:
            steps[name] = step
    for _ in range(ROUNDS):
        if time.perf_counter() - began > MEASURE_S:
            break
        for name, step in steps.items():
            best[name] = min(best[name], _timed(step))
    was_busy = any(is_busy for is_busy, _ in best.values())
    seconds = {name: seconds for name, (_, seconds) in best.items()}
    return Measured(seconds, time.time() + BUSY_S if was_busy else None)


def _timed(step: Step) -> tuple[bool, float]:
    """Whether threads waited for cores during a step, and its seconds: the least is the best."""
    queued, began = queued_ns(), time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return queued_ns() - queued > BUSY * seconds * 1e9, seconds


def _versions() -> list[str]:
    return [version("torch"), library_name()]


def _digest(asked: Mapping[str, object]) -> str:
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _folder() -> Path:
    return cache_folder() / "backends"


def _kept(path: Path, names: Set[str]) -> Measured | None:
    """The measurement in a file; None where there is none that counts and makes sense."""
    try:
        record = read_object(path)
    except (OSError, Unreadable):
        return None
    seconds, until = record.get("seconds"), record.get("until")
    if not isinstance(seconds, dict) or set(seconds) != names:
        return None
    if not all(isinstance(value, float) and value > 0 for value in seconds.values()):
        return None
    if until is not None and not (isinstance(until, float) and time.time() < until):
        return None
    return Measured(seconds, until)


def _keep(path: Path, asked: Mapping[str, object], measured: Measured) -> None:
    """Remember what was measured."""
    record = {"processor": processor_name(), "work": asked, **asdict(measured)}
    try:
        with replacing(path) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    except OSError as error:
        log.info("cannot write %s (%s); the next job will measure again", path, error.strerror)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other processes from measuring, as far as the cache folder and WAIT_S allow."""
    try:
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open_lock(_folder() / ".lock")
    except OSError:  # `_keep` tells of it
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
