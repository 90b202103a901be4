"""The driver's side of an evaluate job's actors."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import ray

from gptray.data.tokens import TokenData
from gptray.jobs.cluster.actors import ActorPool, PooledActor
from gptray.jobs.cluster.ray_metrics import Exporter
from gptray.jobs.cluster.resources import actor_options, worker_resources
from gptray.jobs.cluster.tasks import result_of
from gptray.jobs.evaluate.check import CheckedEvaluation
from gptray.jobs.evaluate.worker import Call, EvaluationTask, Scorer
from gptray.jobs.progress.bar import Bar
from gptray.wording import duration

POLL_S = 0.25
# Calls queued at one actor: just one, since a second could run on another actor that is free.
QUEUED_CALLS = 1


class Scorers(ActorPool[PooledActor]):
    """The actors of a job. Each loads the model at its first call."""

    def __init__(self, checked: CheckedEvaluation, data: TokenData) -> None:
        compute = checked.config.compute
        self._exporter = Exporter(checked.folder.name)
        reserved = worker_resources(compute)
        task = EvaluationTask(
            config=checked.config,
            models=checked.models,
            data_dir=data.data_dir,
            also={name: one.data_dir for name, one in data.also.items()},
            block_size=checked.block_size,
            threads=max(1, int(reserved["CPU"])),
        )
        actor = ray.remote(Scorer).options(**actor_options(compute, reserved))
        super().__init__(
            lambda: PooledActor(actor.remote(task)),
            compute.max_workers,
            name="worker",
            most_deaths=compute.max_failures,
        )

    @property
    def precision(self) -> str:
        """The precision in which all actors compute: fp32 or bf16."""
        ((_, precision),) = self._answered([Call("precision", (), 0)])
        return str(precision)

    def run(self, doing: str, calls: Sequence[Call]) -> list[Any]:
        """Run all calls and return their answers in the same order.

        Raises a call's UserError or RunFailed, or RunFailed if workers keep dying.
        """
        answers = {}
        total = sum(call.tokens for call in calls)
        with closing(_Progress(doing, total, self._exporter)) as progress:
            for number, answer in self._answered(calls):
                answers[number] = answer
                progress.add(calls[number].tokens)
        return [answers[number] for number in range(len(calls))]

    def _answered(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Yield each call's number and answer, in order of arrival."""
        queue = collections.deque(range(len(calls)))

        def feed(member: PooledActor) -> None:
            while queue and len(member.calls) < QUEUED_CALLS:
                number = queue.popleft()
                member.call(member.actor.answer.remote(calls[number]), number)

        while queue or self.is_busy:
            self.each(feed)
            for member, number, answer in self.answers(POLL_S):
                assert number is not None
                member.held.remove(number)
                yield number, result_of(answer)
            queue.extendleft(reversed(self.take_back()))


class _Progress:
    """Shows tokens done, tokens per second and the time left."""

    def __init__(self, doing: str, total: int, exporter: Exporter) -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._began = time.monotonic()
        self._bar, self._exporter = Bar(doing, total), exporter

    def add(self, tokens: int) -> None:
        self._done += tokens
        pace = self._done / max(time.monotonic() - self._began, 1e-9)
        speed, left = f"{pace:,.0f} tok/s", duration((self._total - self._done) / pace)
        self._exporter.set("gptray_done", self._done / self._total, doing=self._doing)
        self._exporter.set("gptray_tokens_per_sec", pace, job="evaluate")
        is_end = self._done >= self._total
        line = f"{self._doing} {self._done:,}/{self._total:,} tokens  {speed}  eta {left}"
        self._bar.show(self._doing, self._done, speed, eta=left, line=None if is_end else line)

    def close(self) -> None:
        self._bar.close()
