"""One small task on every node of the cluster: what each sees, in seconds and without cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gptray.hub import first_line
from gptray.jobs.cluster_nodes import Node, alive_nodes
from gptray.jobs.doing import telling
from gptray.wording import count

# A node answers in seconds, unless it hangs: on a file system that is gone, for example.
DEADLINE_S = 90.0
POLL_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class NoAnswer:
    """Why a node has not answered. is_gone: it has left the cluster meanwhile."""

    reason: str
    is_gone: bool = False


def ask(
    nodes: Sequence[Node], question: Callable[..., T], *given: object, about: str
) -> list[T | NoAnswer]:
    """Call `question(*given)` once on each node, whether its cores are busy or not.

    about: what the nodes are asked about, for the line that says for what the job waits.

    Needs Ray. Returns after DEADLINE_S at the latest; answers come in the nodes' order.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def answer(call: object) -> T | NoAnswer:
        try:
            given_back: T = ray.get(call)
        except ray.exceptions.RayError as error:
            return NoAnswer(f"fails to run a task: {_cause(error)}")
        return given_back

    task = ray.remote(question)
    calls = [
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(*given)
        for node in nodes
    ]
    began, waiting = time.monotonic(), calls
    with telling(lambda: f"waiting for {count(len(waiting), 'node')} to answer about {about}"):
        while waiting and time.monotonic() - began < DEADLINE_S:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
    late = NoAnswer(f"does not answer within {DEADLINE_S:.0f} s")
    answers = [late if call in waiting else answer(call) for call in calls]
    for call in waiting:
        ray.cancel(call, force=True)
    alive = {node.id for node in alive_nodes()}
    return [
        NoAnswer(one.reason, is_gone=node.id not in alive) if isinstance(one, NoAnswer) else one
        for node, one in zip(nodes, answers, strict=True)
    ]


def _cause(error: Exception) -> str:
    """The one line of an error of Ray's that names the cause: the last that names an exception."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if line.partition(":")[0].endswith("Error") and ": " in line]
    return named[-1] if named else first_line(error)
