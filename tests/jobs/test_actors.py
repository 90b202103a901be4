"""A pool of actors: who is given work, and what becomes of it when one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gptray.config import RunFailed


class Doubler:
    """An actor that doubles numbers, and dies of those that are in a file."""

    def __init__(self, deadly: Path) -> None:
        self._deadly = deadly

    def process(self) -> int:
        return os.getpid()

    def double(self, number: int) -> int:
        if self._deadly.exists() and number == int(self._deadly.read_text()):
            self._deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number


@pytest.mark.parametrize("most_deaths", [1, 0])
def test_work_goes_to_those_that_run_and_comes_back_from_those_that_die(
    ray_cluster: None, tmp_path: Path, most_deaths: int, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from gptray.jobs.cluster.actors import ActorPool, PooledActor

    deadly = tmp_path / "deadly"
    deadly.write_text("3")
    # The first one waits for a node that never comes.
    wanted = [{"nowhere": 1.0}, {}, {}]

    def start() -> PooledActor:
        actor = ray.remote(Doubler).options(num_cpus=0, resources=wanted.pop(0))
        return PooledActor(actor.remote(deadly))

    queue, answers = list(range(6)), dict[int, int]()

    def give(member: PooledActor) -> None:
        while queue and len(member.calls) < 2:
            number = queue.pop(0)
            member.call(member.actor.double.remote(number), number)

    def work() -> None:
        with ActorPool(start, 2, name="doubler", most_deaths=most_deaths) as pool:
            waits = pool.members[0]
            try:
                while queue or pool.is_busy:
                    pool.each(give)
                    for member, number, answer in pool.answers(30):
                        assert number is not None and member is not waits
                        member.held.remove(number)
                        answers[number] = answer
                    queue.extend(pool.take_back())
                assert waits not in pool.running and waits.process is None
            finally:
                hopes = waits.open_calls()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(hopes, timeout=30)

    if most_deaths:
        work()
        assert answers == {number: 2 * number for number in range(6)}
        assert [record.getMessage() for record in caplog.records] == [
            "1 of 2 doublers died; its work goes to another"
        ]
    else:
        with pytest.raises(
            RunFailed,
            match=r"^doublers died 1 time, more often than compute\.max_failures=0 allows\. ",
        ):
            work()


class Leaver(Doubler):
    """A Doubler that is taken with its node rather than dying, as Ray tells its callers."""

    def double(self, number: int) -> int:
        from ray.exceptions import RayActorError

        if self._deadly.exists() and number == int(self._deadly.read_text()):
            self._deadly.unlink()
            raise RayActorError(preempted=True)
        return 2 * number


def test_an_actor_that_is_taken_with_its_node_has_not_died(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from gptray.jobs.cluster.actors import ActorPool, PooledActor

    deadly = tmp_path / "deadly"
    deadly.write_text("1")
    actor = ray.remote(Leaver).options(num_cpus=0)
    queue, answers = [0, 1, 2], dict[int, int]()
    with ActorPool(
        lambda: PooledActor(actor.remote(deadly)), 1, name="doubler", most_deaths=0
    ) as pool:
        while queue or pool.is_busy:
            for member in pool.running:
                if queue and not member.calls:
                    number = queue.pop(0)
                    member.call(member.actor.double.remote(number), number)
            for member, done, answer in pool.answers(30):
                assert done is not None
                member.held.remove(done)
                answers[done] = answer
            queue.extend(pool.take_back())
    assert answers == {0: 0, 1: 2, 2: 4}
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 1 doubler was lost with its node; its work goes to another"
    ]
