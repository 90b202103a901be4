"""Sends runs to experiment trackers while a job runs, without ever endangering the job.

`trackers.json` in the run's folder records what each tracker has received, so that a resumed run
continues from there and sends no step twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from pydantic import TypeAdapter

from gptray.config import Config, TrackConfig, flatten, load_config
from gptray.jobs.models import CONFIG
from gptray.jobs.progress.trackers import Ending, Point, Session, TrackedRun, open_session
from gptray.signals import failure
from gptray.storage.files import replacing
from gptray.storage.record import MetricsRow, curves, read_metrics
from gptray.storage.stored import parse_json
from gptray.tuning.sweep_record import load_trials, trial_dir
from gptray.wording import first_line

log = logging.getLogger("gptray")

TRACKERS = "trackers.json"
# How long to wait between updates, and after a failure.
POLL_S, RETRY_S = 5.0, 30.0
# How long the last rows may take at the end of a job, and of one that is stopped.
END_S, STOPPED_S = 60.0, 1.0
# Prefixes of metrics that belong to a row's score, which may come later than the row.
_SCORE_PREFIXES = ("val_", "gap", "also/")
# How a trial ended, for a tracker, by its outcome; all others are finished.
_ENDINGS: dict[str | None, Ending | None] = {None: None, "failed": "failed", "diverged": "failed"}


@dataclass(frozen=True)
class Sent:
    """What a tracker has received of a run: up to which step and score, and how it ended."""

    where: str
    number: str | None = None
    step: int = -1
    scored: int = -1
    ending: Ending | None = None


def new_points(rows: Sequence[MetricsRow], sent: Sent) -> list[Point]:
    """The points to send: new rows, and late scores of rows that were sent before."""
    points: list[Point] = []
    for row in rows:
        step, values = row["step"], curves(row)
        if step <= sent.step:
            values = {key: values[key] for key in values if key.startswith(_SCORE_PREFIXES)}
            if step <= sent.scored:
                continue
        if values:
            points.append((step, values))
    return points


class _Follower:
    """Sends runs to one tracker in its own thread, since a tracker may be slow."""

    def __init__(self, tracker: str, where: str, runs: Callable[[], list[TrackedRun]]) -> None:
        self._tracker, self._where, self._runs = tracker, where, runs
        self._sessions: dict[Path, tuple[Session, Sent]] = {}
        self._has_failed = self._is_stopped = False
        self._ending: Ending | None = None  # of runs without their own
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=tracker, daemon=True)
        self._thread.start()

    def finish(self, ending: Ending, *, stopped: bool) -> None:
        """Send the rest and close. stopped: what is left is sent when the run is resumed."""
        self._ending, self._is_stopped = ending, stopped
        self._done.set()

    def join(self, until: float) -> None:
        """Wait for the rest to be sent, at most until then."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and not self._is_stopped:
            self._tell("it did not accept everything in time")

    def _follow(self) -> None:
        pause = POLL_S
        while not self._done.wait(pause):
            pause = POLL_S if self._send_all() else RETRY_S
        self._send_all()
        assert self._ending
        for session, _ in self._sessions.values():  # sending the rest failed
            self._try(partial(session.close, self._ending))

    def _try(self, do: Callable[[], None]) -> bool:
        """Return whether it succeeded; only the first failure is reported."""
        try:
            do()
        except Exception as error:  # whatever a tracker's package raises
            self._tell(f"{type(error).__name__}: {first_line(error)}")
            return False
        return True

    def _tell(self, why: str) -> None:
        if not self._has_failed:
            log.warning(
                "track.%s=%s is not getting the run: %s; the job continues, and metrics.jsonl "
                "has every row",
                self._tracker,
                self._where,
                why,
            )
        self._has_failed = True

    def _send_all(self) -> bool:
        """Send all runs; return whether all succeeded."""
        return all([self._try(partial(self._send, run)) for run in self._runs()])

    def _send(self, run: TrackedRun) -> None:
        rows = read_metrics(run.folder)
        _, sent = self._sessions.get(run.folder) or (None, self._sent_before(run))
        ending = run.ending or self._ending
        if new_points(rows, sent):
            session, sent = self._sessions.get(run.folder) or self._opened(run, sent)
            session.log(new_points(rows, sent))
            scored = [row["step"] for row in rows if "val_loss" in row]
            sent = replace(sent, step=max(sent.step, rows[-1]["step"]), scored=max([*scored, -1]))
            self._sessions[run.folder] = session, sent
            _save(run.folder, self._tracker, sent)
        if ending and sent.number and sent.ending != ending:
            session, sent = self._sessions.get(run.folder) or self._opened(run, sent)
            del self._sessions[run.folder]
            session.close(ending)
            _save(run.folder, self._tracker, replace(sent, ending=ending))

    def _sent_before(self, run: TrackedRun) -> Sent:
        before = _load(run.folder).get(self._tracker)
        return before if before and before.where == self._where else Sent(self._where)

    def _opened(self, run: TrackedRun, sent: Sent) -> tuple[Session, Sent]:
        """Open the run in the tracker, that of an earlier start if there is one."""
        session = open_session(self._tracker, self._where, run, sent.number)
        if session.last is not None:  # a kill may have lost the record of what was sent
            sent = replace(sent, step=session.last, scored=max(sent.scored, session.last))
        sent = replace(sent, number=session.number, ending=None)
        self._sessions[run.folder] = session, sent
        _save(run.folder, self._tracker, sent)
        return session, sent


_saving = threading.Lock()
_FILE = TypeAdapter(dict[str, Sent])  # trackers.json, by tracker


def _load(folder: Path) -> dict[str, Sent]:
    path = folder / TRACKERS
    return _FILE.validate_python(parse_json(path.read_bytes())) if path.exists() else {}


def _save(folder: Path, tracker: str, sent: Sent) -> None:
    with _saving:
        content = _FILE.dump_json({**_load(folder), tracker: sent}, indent=1)
        with replacing(folder / TRACKERS) as draft:
            draft.write_bytes(content + b"\n")


@contextmanager
def tracking(track: TrackConfig, runs: Callable[[], list[TrackedRun]]) -> Iterator[None]:
    """Send runs to the config's trackers while the block runs."""
    followers = [_Follower(name, where, runs) for name, where in track if where is not None]
    ending: Ending = "failed"
    patience = END_S
    try:
        yield
        ending = "finished"
    except (KeyboardInterrupt, SystemExit):  # Ray's SIGTERM handler exits
        ending, patience = "failed" if failure() else "killed", STOPPED_S
        raise
    finally:
        until = time.monotonic() + patience
        for follower in followers:
            follower.finish(ending, stopped=patience == STOPPED_S)
        for follower in followers:
            follower.join(until)


def tracking_run(config: Config, folder: Path) -> AbstractContextManager[None]:
    """`tracking` for a single run."""
    run = TrackedRun(folder, folder.name, flatten(config))
    return tracking(config.track, lambda: [run])


def tracking_sweep(config: Config, folder: Path) -> AbstractContextManager[None]:
    """`tracking` for a sweep's trials, each a run in the sweep's group."""

    @cache
    def settings(path: Path) -> dict[str, object]:
        return flatten(load_config(str(path), []))

    def runs() -> list[TrackedRun]:
        found = []
        for trial in load_trials(folder):
            path = trial_dir(folder, trial.name)
            if trial.rows:
                name = f"{folder.name}-{trial.name}"
                own = settings(path / CONFIG)
                ending = _ENDINGS.get(trial.outcome, "finished")
                found.append(TrackedRun(path, name, own, folder.name, ending))
        return found

    return tracking(config.track, runs)
