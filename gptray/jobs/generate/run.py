"""Prompts to Parquet in bulk: engines as Ray actors, each fed with parts of the input.

A part is a run of rows that becomes one output file, by rename; which files there are is all that
a restarted job needs to know. Not on Ray Data, whose writes wait for the stage before them and
whose actors drain between two blocks.
"""

from __future__ import annotations

import collections
import logging
import shlex
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gptray.commands import retyped
from gptray.config import Config, RunFailed
from gptray.data.parts import part_name, read_whole, write_part
from gptray.data.prompts import output_schema
from gptray.jobs.base import Job, Plan
from gptray.jobs.cluster import ray_cluster
from gptray.jobs.engine_backend import with_built_backend
from gptray.jobs.generate.check import (
    CheckedBatch,
    CheckedModel,
    check,
    engine_compute,
)
from gptray.jobs.generate.output import Output, check_output
from gptray.jobs.generate.rows_bar import RowsBar
from gptray.jobs.generate.task import GenerateTask
from gptray.jobs.next_steps import resumable, tell
from gptray.jobs.resources import worker_resources
from gptray.jobs.tasks import result_of
from gptray.wording import count

if TYPE_CHECKING:
    from gptray.generation.batch import Progress

log = logging.getLogger("gptray")

POLL_S = 0.25
# Calls at one engine: while it runs a part the next one waits at its door.
IN_LINE = 2


def generate(config: Config) -> dict[str, Any]:
    """Continue every prompt of `generate.input_path`, or those of `sample.prompt` in the terminal.

    Returns the JSON line's facts. Raises UserError for what cannot start, RunFailed when engines
    keep failing or a file cannot be written.
    """
    return run(check(config))


def run(checked: CheckedModel | CheckedBatch) -> dict[str, Any]:
    """Run a job that was checked; see `generate`."""
    if isinstance(checked, CheckedModel):
        from gptray.jobs.generate.terminal import generate_here  # loads torch

        return generate_here(checked)
    return _run_batch(checked)


def _run_batch(checked: CheckedBatch) -> dict[str, Any]:
    job = replace(checked, config=with_built_backend(checked.asked, checked.config))
    folder = job.folder
    with resumable(folder, _command, begun=folder), Output.opened(job) as output:
        missing = output.missing_parts()
        speed: dict[str, Any] = {"tokens_per_sec": 0.0}
        if missing and not output.rows:
            _write_empty(output)
        elif missing:
            rows = sum(map(output.rows_of, missing))
            log.info("%s: %s of %s rows to do", job.model_name, f"{rows:,}", f"{output.rows:,}")
            with ray_cluster():
                speed = Engines(job.config, output, missing).run()
        summary = output.finish()
    reasons = summary["finish_reasons"].items()
    log.info("ended by %s", ", ".join(f"{reason}: {number:,}" for reason, number in reasons))
    read = f"import pandas; print(pandas.read_parquet({str(job.folder)!r}))"
    tell([shlex.join(["python", "-c", read])])
    return {**summary, **speed}


def _command() -> str:
    return retyped("generate") or "the same command"


def plan(checked: CheckedModel | CheckedBatch) -> Plan:
    """What the job would do. Reads the whole input of a batch job; raises UserError as it would."""
    if isinstance(checked, CheckedModel):
        backend = checked.config.generate.backend
        return [("model", str(checked.folder)), ("backend", backend), ("output", "this terminal")]
    job, config = checked, checked.config
    found, samples = check_output(job), config.generate.num_samples
    megabytes = sum(file.size for file in job.files) / 1e6
    columns = output_schema(found.schema, samples).names
    return [
        ("model", str(job.model_dir)),
        ("input", f"{count(len(job.files), 'file')}, {megabytes:.1f} MB, {found.rows:,} rows"),
        ("engines", f"{config.generate.num_workers} of {config.generate.max_batch_size} sequences"),
        ("backend", job.config.generate.backend),
        ("output", str(job.folder)),
        ("rows", f"{found.rows * samples:,}"),
        ("columns", ", ".join(columns)),
        ("files", "part-*.parquet _manifest.json _SUCCESS"),
    ]


def _write_empty(output: Output) -> None:
    """Write the one file of a job without rows: its columns, which need no engine."""
    staged = read_whole(output.staged(0))
    empty = output_schema(staged.schema, output.samples, output.metadata()).empty_table()
    write_part(empty, output.folder / part_name(0))


@dataclass
class _Engine:
    """The driver's side of an actor: its open calls, and the parts it has not written yet."""

    actor: Any
    calls: list[Any] = field(default_factory=list)
    parts: set[int] = field(default_factory=set)
    written_rows: int = 0
    look: Any = None
    progress: Progress | None = None


class Engines:
    """The actors of a job and what each of them is to do."""

    def __init__(self, config: Config, output: Output, missing: list[int]) -> None:
        self._config, self._output = config, output
        self._queue = collections.deque(missing)
        self._failures = 0
        self._reserved = worker_resources(engine_compute(config))
        workers = min(config.generate.num_workers, len(missing))
        self._engines = [self._start() for _ in range(workers)]

    def run(self) -> dict[str, Any]:
        """Have every part written; return the speed."""
        import ray

        output = self._output
        done = output.rows - sum(map(output.rows_of, self._queue))
        with closing(RowsBar(done, output.rows)) as bar:
            while self._queue or any(engine.parts for engine in self._engines):
                for number, engine in enumerate(self._engines):
                    try:
                        done += self._serve(engine)
                    except ray.exceptions.RayActorError as error:
                        self._engines[number] = self._replace(engine, error)
                bar.show(done, [e.progress for e in self._engines if e.progress], self._ahead())
                ray.wait([call for e in self._engines for call in e.calls], timeout=POLL_S)
        return self._speed()

    def _serve(self, engine: _Engine) -> int:
        """Take what an engine has done, give it what it can take; rows written meanwhile."""
        import ray

        rows = 0
        ready, engine.calls = (
            ray.wait(engine.calls, num_returns=max(1, len(engine.calls)), timeout=0)
            if engine.calls
            else ([], [])
        )
        for call in ready:
            for part in result_of(ray.get(call)):
                engine.parts.discard(part)
                rows += self._output.rows_of(part)
        engine.written_rows += rows
        while self._queue and len(engine.calls) < IN_LINE:
            part = self._queue.popleft()
            engine.parts.add(part)
            staged = str(self._output.staged(part))
            engine.calls.append(engine.actor.feed.remote(part, staged))
        if engine.parts and not engine.calls:
            engine.calls.append(engine.actor.finish.remote())
        self._look(engine)
        return rows

    def _look(self, engine: _Engine) -> None:
        """Keep the engine's counters fresh without waiting for them."""
        import ray

        if engine.look is not None and ray.wait([engine.look], timeout=0)[0]:
            counted, engine.look = ray.get(engine.look), None
            if counted and not engine.progress:
                log.debug("an engine runs as process %s", ray.get(engine.actor.process.remote()))
            engine.progress = counted
        if engine.look is None:
            engine.look = engine.actor.progress.remote()

    def _ahead(self) -> int:
        """Rows that have ended in files that are not written yet."""
        return sum(
            max(0, engine.progress.rows - engine.written_rows)
            for engine in self._engines
            if engine.progress
        )

    def _start(self) -> _Engine:
        import ray

        from gptray.jobs.generate.worker import EngineWorker  # loads torch

        output = self._output
        task = GenerateTask(
            self._config,
            threads=max(1, int(self._reserved["CPU"])),
            model_dir=output.job.model_dir,
            model_name=output.job.model_name,
            output_dir=output.folder,
            metadata=output.metadata(),
        )
        actor = ray.remote(EngineWorker).options(
            num_cpus=self._reserved["CPU"],
            num_gpus=self._reserved.get("GPU", 0),
            max_concurrency=IN_LINE + 1,
        )
        return _Engine(actor.remote(task))

    def _replace(self, engine: _Engine, error: Exception) -> _Engine:
        """A new engine for a dead one; the parts that it had not written go back in line."""
        self._failures += 1
        most = self._config.compute.max_failures
        if 0 <= most < self._failures:
            raise RunFailed(
                f"engines failed more than compute.max_failures={most} times; the same command "
                f"resumes with the files that are missing.\n{error}"
            ) from None
        log.warning("an engine died; another takes over its rows")
        lost = engine.parts & set(self._output.missing_parts())
        self._queue.extendleft(sorted(lost, reverse=True))
        return self._start()

    def _speed(self) -> dict[str, Any]:
        """Tokens per second from the first step of an engine to its last; share spent in steps."""
        import ray

        counts = ray.get([engine.actor.progress.remote() for engine in self._engines])
        ran = [c for c in counts if c and c.first is not None and c.last > c.first]
        rate = sum(c.output_tokens / (c.last - c.first) for c in ran)
        share = sum(c.step_seconds for c in ran) / (sum(c.last - c.first for c in ran) or 1.0)
        return {"tokens_per_sec": round(rate, 1), "engine_share": round(share, 3)}


JOB = Job(check, plan, run)
