"""Actors that share a job's work, which never waits for an actor that cannot run yet.

Ray queues an actor that no node has room for, along with all calls to it. So work goes only to
actors that have answered once, and is taken back from those whose process or node dies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeAlias, TypeVar

import ray

from gptray.config import RunFailed, UserError
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.wording import count

log = logging.getLogger("gptray")

Ref: TypeAlias = "ray.ObjectRef[object]"
# The actor is gone, or its answer was lost with its node.
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
)


@dataclass(eq=False)
class PooledActor:
    """The driver's side of an actor.

    process: the actor's process id, once it has answered. held: numbers of its unfinished pieces of
    work. calls: open calls, each with the number of the work that it is about.
    """

    actor: Any
    process: int | None = None
    held: set[int] = field(default_factory=set)
    calls: dict[Ref, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._greeting: Ref = self.actor.process.remote()

    def call(self, answer: Ref, number: int | None = None) -> None:
        """Note an open call, by which the actor now holds the work of this number."""
        self.calls[answer] = number
        if number is not None:
            self.held.add(number)

    def open_calls(self) -> list[Ref]:
        """What to wait for: the open calls or, before any, the actor's first answer."""
        return list(self.calls) if self.process else [self._greeting]

    def answers(self) -> Iterator[tuple[int | None, object]]:
        """Yield each answer that has arrived, once. Raises one of `_LOST`."""
        waiting = self.open_calls()
        if not waiting:
            return
        for ready in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
            if ready == self._greeting:
                process = ray.get(ready)
                assert isinstance(process, int)
                self.process = process
            else:
                yield self.calls.pop(ready), ray.get(ready)


M = TypeVar("M", bound=PooledActor)


class ActorPool(Generic[M]):
    """A job's actors; those that die are replaced. As a context manager, ends them on exit.

    members: all actors, including those not started yet. start: makes a new member; its actor has a
    method `process` that returns its process id. name: of one actor in messages.
    """

    def __init__(self, start: Callable[[], M], number: int, *, name: str, most_deaths: int) -> None:
        self._start, self._name, self._most_deaths = start, name, most_deaths
        self._deaths = 0
        self._lost: list[M] = []
        self.members = [start() for _ in range(number)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Otherwise Ray would still start queued actors, for their first answers. After other
        # errors, Ray may be gone too.
        if error is None or isinstance(error, (UserError, RunFailed)):
            for member in self.members:
                ray.kill(member.actor)

    @property
    def running(self) -> list[M]:
        """The actors that have answered, and so can take work."""
        return [member for member in self.members if member.process]

    @property
    def is_busy(self) -> bool:
        return any(member.held for member in self.members)

    def answers(self, timeout_s: float) -> list[tuple[M, int | None, Any]]:
        """Wait up to timeout_s for answers; return each with its member and its work's number.

        The caller removes finished work from `PooledActor.held`. Raises RunFailed if too many died.
        """
        calls = [call for member in self.members for call in member.open_calls()]
        ray.wait(calls, timeout=timeout_s)
        found: list[tuple[M, int | None, object]] = []
        for member in list(self.members):
            with self._replaced_if_lost(member):
                found.extend((member, *answer) for answer in member.answers())
        return found

    def each(self, look: Callable[[M], None]) -> None:
        """Call `look` with each running member; one that turns out to be dead is replaced."""
        for member in self.running:
            with self._replaced_if_lost(member):
                look(member)

    def take_back(self) -> list[int]:
        """The unfinished work of the actors that died since the last call, in order."""
        lost, self._lost = self._lost, []
        return sorted(number for member in lost for number in member.held)

    @contextmanager
    def _replaced_if_lost(self, member: M) -> Iterator[None]:
        try:
            yield
        except _LOST as error:
            self._lost.append(member)
            self._count(error)
            ray.kill(member.actor)  # in case it is only out of reach
            self.members[self.members.index(member)] = self._start()

    def _count(self, error: Exception) -> None:
        of_all = count(len(self.members), self._name)
        if getattr(error, "preempted", False):  # Ray knew that the node was being preempted
            log.warning("1 of %s was lost with its node; its work goes to another", of_all)
            return
        self._deaths += 1
        if 0 <= self._most_deaths < self._deaths:
            raise RunFailed(
                f"{self._name}s died {count(self._deaths, 'time')}, more often than "
                f"compute.max_failures={self._most_deaths} allows. "
                f"{why_ended(error)}"
            ) from None
        log.warning("1 of %s died; its work goes to another", of_all)


def answers_in(timeout_s: float, calls: Sequence[Ref]) -> list[Any]:
    """The answers that arrive within timeout_s, without those of lost actors."""
    answers = []
    ready = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0] if calls else []
    for call in ready:
        try:
            answers.append(ray.get(call))
        except _LOST as error:
            log.debug("no answer: %s", error)
    return answers
