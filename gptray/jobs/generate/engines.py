"""The engines of a bulk job: Ray actors, each fed with parts of the input.

Not Ray Data, whose writes wait for the previous stage and whose actors drain between blocks.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray
import torch

from gptray.config import Config, ModelConfig, RunFailed, override
from gptray.generation.batch import Progress
from gptray.generation.loading import faster_decoder
from gptray.jobs.cluster.actors import ActorPool, PooledActor, Ref, answers_in
from gptray.jobs.cluster.cluster_nodes import Resources
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.ray_metrics import Exporter
from gptray.jobs.cluster.resources import actor_options, labelled_nodes, worker_resources
from gptray.jobs.cluster.tasks import Failure, attempt, result_of
from gptray.jobs.generate.checked import engine_compute
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.output_plan import UNDECIDED
from gptray.jobs.generate.worker import EngineWorker, GenerateTask
from gptray.jobs.progress.bar import Bar
from gptray.jobs.progress.doing import doing
from gptray.model.shape import read_shape
from gptray.native.measured import Choice
from gptray.wording import duration, first_line

log = logging.getLogger("gptray")

POLL_S = 0.25
# Calls queued at one engine: while it runs a part, the next one is ready.
QUEUED_CALLS = 2
# Deadline for all engines' final counters.
END_S = 10.0


@dataclass(eq=False)
class PooledEngine(PooledActor):
    """The driver's side of an engine. progress: its counters when last read."""

    written_rows: int = 0
    progress: Progress | None = None
    _asked: Ref | None = None

    @property
    def ahead(self) -> int:
        """Finished rows whose files are not written yet."""
        return max(0, self.progress.rows - self.written_rows) if self.progress else 0

    def refresh(self) -> None:
        """Update the counters if an answer has come, and ask again; never waits."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            counted, self._asked = ray.get(self._asked), None
            assert counted is None or isinstance(counted, Progress)
            if counted and not self.progress:
                log.debug("an engine runs as process %s", self.process)
            self.progress = counted
        if self._asked is None:
            self._asked = self.actor.progress.remote()


class Engines:
    """A job's engines and the parts that are left to do.

    If an engine dies, its unfinished parts go to the others.
    """

    def __init__(self, config: Config, output: Output, missing: list[int]) -> None:
        self._output = output
        self._reserved = worker_resources(engine_compute(config))
        if output.backend == UNDECIDED:
            shape = read_shape(output.job.model_dir)
            output.decide(chosen_backend(config, shape, self._reserved))
        self._config = override(config, {"generate.backend": output.backend})
        self._queue = collections.deque(missing)
        self._done = output.rows - sum(map(output.rows_of, missing))
        self._asked = min(config.generate.num_workers, len(missing))

    def run(self) -> dict[str, Any]:
        """Generate every part; return the speed. Raises RunFailed if engines keep dying."""
        most = self._config.compute.max_failures
        size, exporter = self._config.generate.max_batch_size, Exporter(self._output.folder.name)
        with (
            closing(RowsBar(self._done, self._output.rows, exporter, batch_size=size)) as bar,
            ActorPool(self._start, self._asked, name="engine", most_deaths=most) as pool,
        ):
            while self._queue or pool.is_busy:
                pool.each(self._feed)
                for engine, _, written in pool.answers(POLL_S):
                    self._note(engine, result_of(written))
                self._take_back(pool.take_back())
                counted = [engine.progress for engine in pool.running if engine.progress]
                bar.show(self._done, counted, sum(engine.ahead for engine in pool.running))
            counts = [engine.actor.end.remote() for engine in pool.running]
            return _speed(answers_in(END_S, counts))

    def _feed(self, engine: PooledEngine) -> None:
        """Give an engine as many parts as it can queue."""
        while self._queue and len(engine.calls) < QUEUED_CALLS:
            part = self._queue.popleft()
            engine.call(engine.actor.feed.remote(part, self._output.handed(part)), part)
        if engine.held and not engine.calls:
            engine.call(engine.actor.finish.remote())
        engine.refresh()

    def _note(self, engine: PooledEngine, written: list[int]) -> None:
        """Note the parts that an engine has written."""
        rows = sum(map(self._output.rows_of, written))
        engine.held.difference_update(written)
        engine.written_rows += rows
        self._done += rows

    def _take_back(self, parts: list[int]) -> None:
        """Queue the parts of dead engines again, except those that are already written."""
        missing = set(self._output.missing_parts()) if parts else set()
        self._queue.extendleft(part for part in reversed(parts) if part in missing)
        self._done += sum(self._output.rows_of(part) for part in parts if part not in missing)

    def _start(self) -> PooledEngine:
        output = self._output
        task = GenerateTask(
            self._config,
            threads=max(1, int(self._reserved["CPU"])),
            model=output.job.model,
            model_name=output.job.full_name,
            output=output.job.output,
            metadata=output.metadata(),
        )
        options = actor_options(self._config.compute, self._reserved)
        actor = ray.remote(EngineWorker).options(**options, max_concurrency=QUEUED_CALLS + 1)
        return PooledEngine(actor.remote(task))


def _speed(counts: list[Progress | None]) -> dict[str, Any]:
    """Tokens per second of all engines, first to last step; the share of that time in steps."""
    ran = [(c, c.last - c.first) for c in counts if c and c.first is not None and c.last > c.first]
    rate = sum(counted.output_tokens / seconds for counted, seconds in ran)
    share = sum(counted.step_seconds for counted, _ in ran) / (sum(s for _, s in ran) or 1.0)
    return {"tokens_per_sec": round(rate, 1), "engine_share": round(share, 3)}


class RowsBar:
    """A bar over all rows of a job, including those of earlier starts; also exports metrics.

    batch_size: of one engine.
    """

    def __init__(self, done: int, total: int, exporter: Exporter, *, batch_size: int) -> None:
        self._exporter, self._batch_size = exporter, batch_size
        self._total, self._first = total, done
        self._began = time.monotonic()
        self._bar = Bar("starting engines", total, done=done)

    def close(self) -> None:
        self._bar.close()

    def show(self, written: int, engines: Sequence[Progress], ahead: int) -> None:
        """Show progress: `written` rows are in files, `ahead` more are finished."""
        running = [engine for engine in engines if engine.first is not None]
        if not running:
            self._began = time.monotonic()
            return
        rows = min(written + ahead, self._total)
        seconds = max(time.monotonic() - self._began, 1e-9)
        pace = (rows - self._first) / seconds
        tokens = sum(engine.output_tokens for engine in running) / seconds
        left = duration((self._total - rows) / pace) if pace else "?"
        self._export(running, rows, tokens)
        speed = f"{tokens:,.0f} tok/s"
        line = f"{rows:,}/{self._total:,} rows  {speed}  eta {left}" if tokens else None
        self._bar.show("generating", rows, speed, eta=left, line=line)

    def _export(self, engines: Sequence[Progress], rows: int, tokens_per_sec: float) -> None:
        states = {
            "done": rows,
            "failed": sum(engine.errors for engine in engines),
            "all": self._total,
        }
        for state, number in states.items():
            self._exporter.set("gptray_rows", number, state=state)
        self._exporter.set("gptray_tokens_per_sec", tokens_per_sec, job="generate")
        for name, value in (
            ("gptray_engines", len(engines)),
            ("gptray_batch_size", len(engines) * self._batch_size),
            ("gptray_sequences_running", sum(engine.running for engine in engines)),
            ("gptray_sequences_waiting", sum(engine.waiting for engine in engines)),
        ):
            self._exporter.set(name, value)


def chosen_backend(config: Config, shape: ModelConfig, reserved: Resources) -> str:
    """Resolve generate.backend=auto on CPUs for a network of this shape, and log why.

    reserved: an engine's resources. If engines may run on other machines, which may be of another
    kind, this waits for an actor there.

    Raises UserError for a precision that the machine lacks, RunFailed if the actor dies.
    """
    threads = max(1, int(reserved["CPU"]))
    with doing("choosing between the native kernels and PyTorch"):
        nodes = [node.id for node in labelled_nodes(config.compute)]
        if nodes == [ray.get_runtime_context().get_node_id()]:
            outcome = Chooser().choose(config, shape, threads)
        else:
            outcome = _chosen_elsewhere(config, shape, threads, reserved)
    choice = result_of(outcome)
    log.info("%s", choice.why)
    return choice.backend


class Chooser:
    """Times the backends in its process. As an actor, a wait for its resources is logged."""

    def choose(self, config: Config, shape: ModelConfig, threads: int) -> Choice | Failure:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            size = config.generate.max_batch_size
            adapts = config.generate.adapters is not None
            return attempt(
                lambda: faster_decoder(config, shape, max_batch_size=size, takes_adapters=adapts)
            )
        finally:
            torch.set_num_threads(before)


def _chosen_elsewhere(
    config: Config, shape: ModelConfig, threads: int, reserved: Resources
) -> Choice | Failure:
    most = config.compute.max_failures
    options = actor_options(config.compute, reserved)
    asked = ray.remote(Chooser).options(**options, max_restarts=most, max_task_retries=most)
    actor = asked.remote()
    try:
        outcome: Choice | Failure = ray.get(actor.choose.remote(config, shape, threads))
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"choosing generate.backend failed: {why_ended(error, otherwise=first_line(error))}; "
            "set it to native or torch"
        ) from None
    finally:
        ray.kill(actor)
    return outcome
