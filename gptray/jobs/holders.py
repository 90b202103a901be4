"""Who holds a cluster's cores and GPUs, as far as Ray's tables say: placement groups and actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gptray.jobs.cluster_nodes import amount_words, total

if TYPE_CHECKING:
    from ray.core.generated.gcs_pb2 import ActorTableData

# Characters of a job's command in a message.
WIDTH = 60

Resources = Mapping[str, float]


def holders() -> tuple[int, str]:
    """How many placements this job has, and the other job that holds the most, in words.

    Such as "; job 0300 (python x.py) holds 4 cores"; empty where Ray knows of none.
    """
    import ray

    own = ray.get_runtime_context().get_job_id()
    held: dict[str, dict[str, float]] = {}
    number = 0
    for job, resources in _held():
        if job == own:
            number += 1
        else:
            held[job] = total([held.get(job, {}), resources])
    if not held:
        return number, ""
    job = max(held, key=lambda one: (held[one].get("GPU", 0.0), held[one].get("CPU", 0.0)))
    commands = {one["JobID"]: one["Entrypoint"] for one in ray._private.state.state.job_table()}
    command = " ".join(commands.get(job, "").split())
    command = command if len(command) <= WIDTH else f"{command[:WIDTH]}..."
    name = f"job {job} ({command})" if command else f"job {job}"
    return number, f"; {name} holds {amount_words(held[job])}"


def _held() -> list[tuple[str, Resources]]:
    """The job and the resources of all that holds some; what tasks hold is in no table."""
    import ray

    groups = [
        (name[-len(ray.JobID.nil().hex()) :], counted(bundle))
        for name, group in ray.util.placement_group_table().items()
        if group["state"] == "CREATED"
        for bundle in group["bundles"].values()
    ]
    actors = [
        (table.job_id.hex(), counted(table.required_resources))
        for table in actors_in("ALIVE")
        if not table.placement_group_id
    ]
    return [(job, resources) for job, resources in [*groups, *actors] if resources]


def actors_in(state: str) -> list[ActorTableData]:
    """Ray's records of the actors of all jobs that are in a state."""
    import ray
    from ray.core.generated import gcs_pb2

    accessor = ray._private.state.state._connect_and_get_accessor()
    return [gcs_pb2.ActorTableData.FromString(one) for one in accessor.get_actor_table(None, state)]


def counted(resources: Resources) -> dict[str, float]:
    """The cores and GPUs among resources."""
    return {name: resources[name] for name in ("GPU", "CPU") if resources.get(name)}
