"""Finds who holds a cluster's cores and GPUs, by Ray's tables of placement groups and actors."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import ray
from ray.core.generated.gcs_pb2 import ActorTableData

from gptray.jobs.cluster.cluster_nodes import Resources, amount_words, total

# The most characters of a job's command in a message.
WIDTH = 60
# Prefix of the actor that runs a submitted job's command and holds the command's resources.
_RUNS_COMMAND = "_ray_internal_job_actor_"
# Ray sets this for such a command.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class _Held(NamedTuple):
    job: str  # a job's id, or the submission's id for what its command holds
    resources: Resources
    node: str = ""


def holders() -> tuple[int, str]:
    """The number of this job's placements, and in words the other job that holds the most.

    Such as "; job 0300 (python x.py) holds 4 cores"; "" if Ray knows of none.
    """
    own, own_command = ray.get_runtime_context().get_job_id(), _submission()
    held: dict[str, dict[str, float]] = {}
    number = 0
    for one in _held():
        if one.job == own:
            number += 1
        elif one.job != own_command:
            held[one.job] = total([held.get(one.job, {}), one.resources])
    if not held:
        return number, ""
    job = max(held, key=lambda one: (held[one].get("GPU", 0.0), held[one].get("CPU", 0.0)))
    commands = {one["JobID"]: one["Entrypoint"] for one in ray._private.state.state.job_table()}
    command = " ".join(commands.get(job, "").split())
    command = command if len(command) <= WIDTH else f"{command[:WIDTH]}..."
    name = f"job {job} ({command})" if command else f"job {job}"
    return number, f"; {name} holds {amount_words(held[job])}"


def held_by_command() -> tuple[str, Resources]:
    """The node's id and resources that this job's own command holds, ("", {}) if none.

    Commands hold resources if submitted with, say, `ray job submit --entrypoint-num-cpus 1`.
    """
    own = _submission()
    if own is None:
        return "", {}
    commands = [one for one in _held_by_actors() if one.job == own]
    return (commands[0].node, commands[0].resources) if commands else ("", {})


def _submission() -> str | None:
    """The id of this job's submission; None if it was not submitted to the cluster."""
    metadata = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("metadata", {})
    submission: str | None = metadata.get("job_submission_id")
    return submission


def _held() -> list[_Held]:
    """All holders of cores or GPUs except tasks, which are in no table."""
    groups = [
        _Held(name[-len(ray.JobID.nil().hex()) :], counted(bundle))
        for name, group in ray.util.placement_group_table().items()
        if group["state"] == "CREATED"
        for bundle in group["bundles"].values()
    ]
    return [one for one in [*groups, *_held_by_actors()] if one.resources]


def _held_by_actors() -> list[_Held]:
    """What actors outside placement groups hold."""
    return [
        _Held(
            table.name.removeprefix(_RUNS_COMMAND)
            if table.name.startswith(_RUNS_COMMAND)
            else table.job_id.hex(),
            counted(table.required_resources),
            table.address.node_id.hex(),
        )
        for table in actors_in("ALIVE")
        if not table.placement_group_id
    ]


def actors_in(state: str) -> list[ActorTableData]:
    """Ray's records of all jobs' actors in a state."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    return [ActorTableData.FromString(one) for one in accessor.get_actor_table(None, state)]


def counted(resources: Resources) -> dict[str, float]:
    """The cores and GPUs among resources."""
    return {name: resources[name] for name in ("GPU", "CPU") if resources.get(name)}
