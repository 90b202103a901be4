"""What a job says of itself while it has nothing else to say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptray.cli import run_job
from gptray.config import Config
from gptray.jobs.base import Job
from gptray.jobs.progress import doing
from gptray.jobs.progress.bar import Bar
from gptray.jobs.tune.watch import watching_sweep
from gptray.storage.record import write_event
from gptray.tuning.sweep_record import Record, trial_dir

LIMIT_S = 60
log = logging.getLogger("gptray")


class Lines(logging.Handler):
    """What is logged; `next` waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._came:
            self.said.append(record.getMessage())
            self._came.notify()

    def next(self) -> str:
        count = len(self.said)
        assert self.come(count, LIMIT_S)
        return self.said[count]

    def come(self, count: int, within_s: float) -> bool:
        """Whether there are more than so many within the time."""
        with self._came:
            return self._came.wait_for(lambda: len(self.said) > count, within_s)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    monkeypatch.setattr(doing, "QUIET_S", 0.05)
    monkeypatch.setattr(doing, "POLL_S", 0.01)
    handler, level = Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_silent_job_says_what_it_is_doing_and_since_when(lines: Lines) -> None:
    with doing.doing("starting workers"):
        assert lines.next() == "starting workers, less than a second so far"
        assert lines.next() == "starting workers, less than a second so far"


def test_of_blocks_in_each_other_the_innermost_speaks(lines: Lines) -> None:
    with doing.doing("starting engines"), doing.doing("asking the nodes"):
        lines.next()
        lines.next()
    assert {line.partition(",")[0] for line in lines.said} == {"asking the nodes"}


def test_a_check_that_takes_long_says_so(lines: Lines) -> None:
    told: list[str] = []

    def check(config: Config) -> None:
        log.addHandler(lines)  # the command line has set its own
        told.append(lines.next())

    assert run_job("train", doc="", argv=[], job=Job(check, lambda _: [], lambda _: None)) == 0
    assert told[0].startswith("checking what the job needs, ")


def test_silence_before_a_block_counts(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doing, "QUIET_S", 0.3)
    for _ in range(100):
        with doing.doing("starting trials"):  # each is shorter
            if lines.come(0, 0.03):
                return
    raise AssertionError("nothing was told")


def test_nothing_is_added_to_the_line_of_a_wait_until_it_is_over(lines: Lines) -> None:
    with doing.doing("starting workers"):
        log.info("waiting for 1 core", extra=doing.OF_WAIT)
        with doing.doing("something else"):  # heard nothing of the wait
            lines.next()
        log.info("waiting for 1 core", extra=doing.OF_WAIT)
        with doing.doing("something else"):
            lines.next()
        assert not any(line.startswith("starting") for line in lines.said)


def test_a_bar_without_a_terminal_repeats_where_things_stand(lines: Lines) -> None:
    bar = Bar("starting engines", 4)
    assert lines.next() == "starting engines, less than a second so far"
    bar.show("generating", 1, "5 tok/s", eta="1m", line="1/4 rows")
    while lines.next() != "1/4 rows":
        pass
    bar.close()


def test_a_sweep_says_that_its_trials_build_the_kernels(lines: Lines, tmp_path: Path) -> None:
    record, folder = Record(tmp_path), trial_dir(tmp_path, "0000")
    record.write("planned", trial="0000", values={}, max_steps=40)
    record.write("started", trial="0000")
    folder.mkdir(parents=True)
    write_event(folder, "building", message="building the C++ kernels")
    with watching_sweep(tmp_path, 1, on_change=lambda: None):
        assert lines.next() == "0 of 1 trial; running: 0000 building the C++ kernels"
        write_event(folder, "start", step=0)
        while lines.next() != "0 of 1 trial; running: 0000 at step 0":
            pass
