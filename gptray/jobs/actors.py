"""Actors that share a job's work; the work never waits for an actor that cannot run yet.

Ray queues an actor for which no node has room, and every call to it. So work goes to actors that
have answered once, and comes back from those that die: with their process, or with their node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeAlias, TypeVar

import ray

from gptray.config import RunFailed, UserError
from gptray.wording import count

log = logging.getLogger("gptray")

Ref: TypeAlias = "ray.ObjectRef[object]"
# An actor is gone, or with its node what it has answered.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)


@dataclass(eq=False)
class Member:
    """The driver's side of an actor.

    process: the actor's process id, once it has answered. held: numbers of the work that was given
    to it and is not done. calls: those that are open, with the number of the work each is about.
    """

    actor: Any
    process: int | None = None
    held: set[int] = field(default_factory=set)
    calls: dict[Ref, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._greeting: Ref = self.actor.process.remote()

    def call(self, answer: Ref, number: int | None = None) -> None:
        """Note a call that was made, with which the actor holds the work of this number."""
        self.calls[answer] = number
        if number is not None:
            self.held.add(number)

    def open_calls(self) -> list[Ref]:
        """What may be waited for: the calls, or before them the first answer of all."""
        return list(self.calls) if self.process else [self._greeting]

    def answers(self) -> Iterator[tuple[int | None, object]]:
        """What has been answered by now, each once. Raises one of `_LOST`."""
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


M = TypeVar("M", bound=Member)


class Crew(Generic[M]):
    """The actors of a job; those that die are replaced. As a context, ends them.

    members: all of them, also those that have not started. `start` gives a new one, of an actor
    with a method `process` that returns its process id. name: what one is called.
    """

    def __init__(self, start: Callable[[], M], number: int, *, name: str, most_deaths: int) -> None:
        self._start, self._name, self._most_deaths = start, name, most_deaths
        self._deaths = 0
        self._lost: list[M] = []
        self.members = [start() for _ in range(number)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Without this, Ray would start one that is still queued, for its first answer. What else
        # ends a job may have ended Ray too.
        if error is None or isinstance(error, (UserError, RunFailed)):
            self.close()

    def close(self) -> None:
        """End all actors, and those that are still queued."""
        for member in self.members:
            ray.kill(member.actor)

    @property
    def running(self) -> list[M]:
        """Those that have answered, and so can take work."""
        return [member for member in self.members if member.process]

    @property
    def is_busy(self) -> bool:
        return any(member.held for member in self.members)

    def answers(self, timeout_s: float) -> list[tuple[M, int | None, Any]]:
        """Wait for an answer, at most so long; all that came: from whom, to what, and what.

        The caller drops from `Member.held` what is done. Raises RunFailed when too many died.
        """
        calls = [call for member in self.members for call in member.open_calls()]
        ray.wait(calls, timeout=timeout_s)
        found: list[tuple[M, int | None, object]] = []
        for member in list(self.members):
            with self._replaced_if_lost(member):
                found.extend((member, *answer) for answer in member.answers())
        return found

    def each(self, look: Callable[[M], None]) -> None:
        """Call `look` with all that run; one that turns out dead is replaced."""
        for member in self.running:
            with self._replaced_if_lost(member):
                look(member)

    def take_back(self) -> list[int]:
        """The work that was not done by those that died since the last call, in order."""
        lost, self._lost = self._lost, []
        return sorted(number for member in lost for number in member.held)

    @contextmanager
    def _replaced_if_lost(self, member: M) -> Iterator[None]:
        try:
            yield
        except _LOST as error:
            self._lost.append(member)
            self._count(error)
            ray.kill(member.actor)  # where it is only out of reach
            self.members[self.members.index(member)] = self._start()

    def _count(self, error: Exception) -> None:
        of_all = count(len(self.members), self._name)
        if getattr(error, "preempted", False):  # Ray knew that the node would be taken
            log.warning("1 of %s was lost with its node; its work goes to another", of_all)
            return
        self._deaths += 1
        if 0 <= self._most_deaths < self._deaths:
            # The lines before it are numbers by which Ray knows the actor.
            why = str(error).strip().splitlines()[-1]
            raise RunFailed(
                f"{self._name}s died more than compute.max_failures={self._most_deaths} times. "
                f"{why}"
            ) from None
        log.warning("1 of %s died; its work goes to another", of_all)


def answers_in(timeout_s: float, calls: Sequence[Ref]) -> list[Any]:
    """Answers that come in this time, without those of actors that are gone."""
    answers = []
    ready = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0] if calls else []
    for call in ready:
        try:
            answers.append(ray.get(call))
        except _LOST as error:
            log.debug("no answer: %s", error)
    return answers
