"""A cluster's nodes: their resources, what is free, and asking each a question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.progress.doing import telling
from gptray.wording import count, first_line

HEAD = "node:__internal_head__"  # a resource that only the head has
_ID_LABEL = "ray.io/node-id"  # a label that every node has
PLACE = "gptray-place-"  # begins the names of placement groups for future training workers
_NAMED = 3  # how many of several like nodes a message names
# A node answers within seconds unless it hangs, for example on a lost file system.
DEADLINE_S, POLL_S = 90.0, 1.0

T = TypeVar("T")
# Amounts as Ray counts them, such as CPU and GPU.
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Node:
    """An alive node. id, labels: Ray's."""

    address: str
    resources: Resources
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        """The cores that it offers to Ray."""
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        """The GPUs that it offers to Ray."""
        return self.resources.get("GPU", 0.0)

    @property
    def is_head(self) -> bool:
        """Whether this is the head node, which no autoscaler adds."""
        return HEAD in self.resources


def alive_nodes() -> list[Node]:
    """All alive nodes. Needs Ray, like all functions here without arguments."""
    return [
        Node(node["NodeManagerAddress"], node["Resources"], node["NodeID"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def has_labels(node: Node, selector: Mapping[str, str]) -> bool:
    """Whether a node matches a selector of VALUE, !VALUE, in(VALUE, ...) or !in(VALUE, ...)."""
    for name, wanted in selector.items():
        value = wanted.removeprefix("!")
        values = value[len("in(") : -1].split(",") if value.startswith("in(") else [value]
        is_one = node.labels.get(name) in {one.strip() for one in values}
        if is_one == wanted.startswith("!"):
            return False
    return True


def free_resources() -> dict[str, Resources]:
    """Free resources of each alive node, by its id."""
    free: dict[str, Resources] = ray._private.state.available_resources_per_node()
    return free


def nodes_being_preempted() -> dict[str, float]:
    """Ids of the nodes being preempted, and when they will be, as `time.time`; 0: unknown."""
    draining = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 for node, deadline_ms in draining.items()}


def amount_words(resources: Resources) -> str:
    """GPUs and cores in words, such as "1 GPU and 4 cores" or "0.5 cores"."""
    gpus, cores = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    words = _amount(cores, "core")
    return f"{_amount(gpus, 'GPU')} and {words}" if gpus else words


def _amount(number: float, noun: str) -> str:
    return f"{number:,.4g} {noun}" + ("" if number == 1 else "s")


def total(all_resources: Iterable[Resources]) -> dict[str, float]:
    """The sum of resources over nodes or workers."""
    summed: dict[str, float] = {}
    for resources in all_resources:
        for name, number in resources.items():
            summed[name] = summed.get(name, 0.0) + number
    return summed


def nodes_words(nodes: Iterable[Node]) -> str:
    """The nodes grouped by resources: "10.0.0.1 has 16 cores; 10.0.0.2, 10.0.0.3 have 8 each"."""
    return _grouped(((node.address, amount_words(node.resources)) for node in nodes), each=" each")


def labels_words(nodes: Iterable[Node]) -> str:
    """The nodes grouped by labels: "10.0.0.1 has zone=a; 10.0.0.2, 10.0.0.3 have none"."""
    pairs = []
    for node in nodes:
        labels = [f"{name}={one}" for name, one in sorted(node.labels.items()) if name != _ID_LABEL]
        pairs.append((node.address, ", ".join(labels) or "none"))
    return _grouped(pairs)


def _grouped(pairs: Iterable[tuple[str, str]], *, each: str = "") -> str:
    """Addresses grouped by what they have, as (address, words). each: follows that of several."""
    groups: dict[str, list[str]] = {}
    for address, words in pairs:
        groups.setdefault(words, []).append(address)
    return "; ".join(
        f"{_names(addresses)} has {words}"
        if len(addresses) == 1
        else f"{_names(addresses)} have {words}{each}"
        for words, addresses in groups.items()
    )


def _names(addresses: list[str]) -> str:
    more = len(addresses) - _NAMED
    return ", ".join(addresses[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class NoAnswer:
    """Why a node has not answered. is_gone: whether it has left the cluster meanwhile."""

    reason: str
    is_gone: bool = False


def ask(
    nodes: Sequence[Node], question: Callable[..., T], *given: object, about: str
) -> list[T | NoAnswer]:
    """Call `question(*given)` once on each node, even if its cores are busy.

    about: the subject of the question, for the line that says what the job waits for.
    Needs Ray. Returns within DEADLINE_S; answers are in the nodes' order.
    """

    def answer(call: object) -> T | NoAnswer:
        try:
            given_back: T = ray.get(call)
        except ray.exceptions.RayError as error:
            # A full memory, or the line of the error that names the cause: the last exception's.
            lines = [line.strip() for line in str(error).splitlines()]
            named = [
                one for one in lines if one.partition(":")[0].endswith("Error") and ": " in one
            ]
            cause = why_ended(error, otherwise=named[-1] if named else first_line(error))
            return NoAnswer(f"fails to run a task: {cause}")
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
