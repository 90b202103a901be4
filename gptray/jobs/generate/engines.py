"""The engines of a bulk job: Ray actors, each fed with parts of the input.

Not on Ray Data, whose writes wait for the stage before them and whose actors drain between two
blocks.
"""

from __future__ import annotations

import collections
import logging
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray

from gptray.config import Config, override
from gptray.generation.batch import Progress
from gptray.jobs.actors import Crew, Member, Ref, answers_in
from gptray.jobs.generate.check import engine_compute
from gptray.jobs.generate.engine_choice import chosen_backend
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.output_plan import UNDECIDED
from gptray.jobs.generate.rows_bar import RowsBar
from gptray.jobs.generate.task import GenerateTask
from gptray.jobs.generate.worker import EngineWorker
from gptray.jobs.ray_metrics import Exporter
from gptray.jobs.resources import worker_resources
from gptray.jobs.tasks import result_of
from gptray.model.shape import read_shape

log = logging.getLogger("gptray")

POLL_S = 0.25
# Calls at one engine: while it runs a part the next one waits at its door.
IN_LINE = 2
# Seconds for the counters of all engines at the end.
END_S = 10.0


@dataclass(eq=False)
class Engine(Member):
    """The driver's side of an engine. progress: its counters, as last seen."""

    written_rows: int = 0
    progress: Progress | None = None
    _look: Ref | None = None

    @property
    def ahead(self) -> int:
        """Rows that have ended in files that are not written yet."""
        return max(0, self.progress.rows - self.written_rows) if self.progress else 0

    def look(self) -> None:
        """Keep the counters fresh without waiting for them."""
        if self._look is not None and ray.wait([self._look], timeout=0)[0]:
            counted, self._look = ray.get(self._look), None
            assert counted is None or isinstance(counted, Progress)
            if counted and not self.progress:
                log.debug("an engine runs as process %s", self.process)
            self.progress = counted
        if self._look is None:
            self._look = self.actor.progress.remote()


class Engines:
    """The engines of a job and the parts that are left to do.

    Parts go to engines that run; those of an engine that dies go to the others.
    """

    def __init__(self, config: Config, output: Output, missing: list[int]) -> None:
        self._output = output
        self._reserved = worker_resources(engine_compute(config))
        self._config = self._with_backend(config)
        self._queue = collections.deque(missing)
        self._done = output.rows - sum(map(output.rows_of, missing))
        self._asked = min(config.generate.num_workers, len(missing))

    def _with_backend(self, config: Config) -> Config:
        """The config with the backend that the job began with, or begins with now."""
        output = self._output
        if output.backend == UNDECIDED:
            shape = read_shape(output.job.model_dir)
            output.decide(chosen_backend(config, shape, self._reserved))
        return override(config, {"generate.backend": output.backend})

    def run(self) -> dict[str, Any]:
        """Have every part written; return the speed. Raises RunFailed if engines keep dying."""
        most = self._config.compute.max_failures
        size, exporter = self._config.generate.max_batch_size, Exporter(self._output.folder.name)
        with (
            closing(RowsBar(self._done, self._output.rows, exporter, batch_size=size)) as bar,
            Crew(self._start, self._asked, name="engine", most_deaths=most) as crew,
        ):
            while self._queue or crew.is_busy:
                crew.each(self._feed)
                for engine, _, written in crew.answers(POLL_S):
                    self._note(engine, result_of(written))
                self._take_back(crew.take_back())
                counted = [engine.progress for engine in crew.running if engine.progress]
                bar.show(self._done, counted, sum(engine.ahead for engine in crew.running))
            counts = [engine.actor.end.remote() for engine in crew.running]
            return _speed(answers_in(END_S, counts))

    def _feed(self, engine: Engine) -> None:
        """Give an engine what it can take."""
        while self._queue and len(engine.calls) < IN_LINE:
            part = self._queue.popleft()
            engine.call(engine.actor.feed.remote(part, self._output.handed(part)), part)
        if engine.held and not engine.calls:
            engine.call(engine.actor.finish.remote())
        engine.look()

    def _note(self, engine: Engine, written: list[int]) -> None:
        """Drop the parts that an engine has written from what it holds."""
        rows = sum(map(self._output.rows_of, written))
        engine.held.difference_update(written)
        engine.written_rows += rows
        self._done += rows

    def _take_back(self, parts: list[int]) -> None:
        """Put parts of dead engines in line again, but for those that they wrote before."""
        missing = set(self._output.missing_parts()) if parts else set()
        self._queue.extendleft(part for part in reversed(parts) if part in missing)
        self._done += sum(self._output.rows_of(part) for part in parts if part not in missing)

    def _start(self) -> Engine:
        output = self._output
        task = GenerateTask(
            self._config,
            threads=max(1, int(self._reserved["CPU"])),
            model=output.job.model,
            model_name=output.job.called,
            output=output.job.output,
            metadata=output.metadata(),
        )
        actor = ray.remote(EngineWorker).options(
            num_cpus=self._reserved["CPU"],
            num_gpus=self._reserved.get("GPU", 0),
            label_selector=self._config.compute.selector,
            max_concurrency=IN_LINE + 1,
        )
        return Engine(actor.remote(task))


def _speed(counts: list[Progress | None]) -> dict[str, Any]:
    """Tokens per second from the first step of an engine to its last; share spent in steps."""
    ran = [(c, c.last - c.first) for c in counts if c and c.first is not None and c.last > c.first]
    rate = sum(counted.output_tokens / seconds for counted, seconds in ran)
    share = sum(counted.step_seconds for counted, _ in ran) / (sum(s for _, s in ran) or 1.0)
    return {"tokens_per_sec": round(rate, 1), "engine_share": round(share, 3)}
