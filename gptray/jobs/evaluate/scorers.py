"""The actors of an evaluate job as its driver uses them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import ray
from ray.util import ActorPool

from gptray.config import RunFailed
from gptray.data.tokens import TokenData
from gptray.jobs.bar import Bar
from gptray.jobs.evaluate.check import CheckedEvaluation
from gptray.jobs.evaluate.task import Call, EvaluationTask
from gptray.jobs.evaluate.worker import Scorer
from gptray.jobs.resources import worker_resources
from gptray.jobs.tasks import result_of
from gptray.jobs.train.watch import duration


class Scorers:
    """The actors of a job. They load the model at the first call."""

    def __init__(self, checked: CheckedEvaluation, data: TokenData) -> None:
        compute = checked.config.compute
        reserved = worker_resources(compute)
        task = EvaluationTask(
            config=checked.config,
            model_dir=checked.model_dir,
            data_dir=data.data_dir,
            block_size=checked.block_size,
            threads=max(1, int(reserved["CPU"])),
        )
        actor = ray.remote(Scorer).options(
            num_cpus=reserved["CPU"],
            num_gpus=reserved.get("GPU", 0),
            max_restarts=compute.max_failures,
            max_task_retries=compute.max_failures,
        )
        self._most_failures = compute.max_failures
        self._actors = [actor.remote(task) for _ in range(compute.num_workers)]
        self._pool = ActorPool(self._actors)

    @property
    def precision(self) -> str:
        """What the networks of all actors compute in: fp32 or bf16."""
        precision: str = ray.get(self._actors[0].precision.remote())
        return precision

    def run(self, doing: str, calls: Sequence[Call]) -> list[Any]:
        """Have all calls answered; the answers in the calls' order.

        Raises the UserError or RunFailed of a call, or RunFailed when workers keep dying.
        """

        def start(actor: Any, call: Call) -> Any:
            return actor.answer.remote(call)

        try:
            with closing(_Progress(doing, sum(call.tokens for call in calls))) as progress:
                answers = []
                for call, answer in zip(calls, self._pool.map(start, calls), strict=True):
                    answers.append(result_of(answer))
                    progress.add(call.tokens)
                return answers
        except ray.exceptions.RayActorError as error:
            # Its other lines are numbers by which Ray knows the actor.
            why = str(error).strip().splitlines()[-1]
            raise RunFailed(
                f"a worker died more than compute.max_failures={self._most_failures} times. {why}"
            ) from None


class _Progress:
    """Tokens done, tokens per second, time to go."""

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._began = time.monotonic()
        self._bar = Bar(doing, total)

    def add(self, tokens: int) -> None:
        self._done += tokens
        pace = self._done / max(time.monotonic() - self._began, 1e-9)
        speed, left = f"{pace:,.0f} tok/s", duration((self._total - self._done) / pace)
        is_end = self._done >= self._total
        line = f"{self._doing} {self._done:,}/{self._total:,} tokens  {speed}  eta {left}"
        self._bar.show(self._doing, self._done, speed, eta=left, line=None if is_end else line)

    def close(self) -> None:
        self._bar.close()
