"""cluster.yaml against the schema that Ray's launcher itself checks it with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).resolve().parent.parent / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    return config


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Ray's defaults and validate, as `ray up` does first."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = check(cluster)
    assert prepared["provider"]["type"] == "aws"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize("section", [[], ["available_node_types", "gpu_worker"], ["auth"]])
def test_mistyped_key_is_refused(cluster: dict[str, Any], section: list[str]) -> None:
    place = cluster
    for name in section:
        place = place[name]
    place["max_worker"] = 2
    with pytest.raises(ValidationError, match="max_worker"):
        check(cluster)


def test_wrong_type_is_refused(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minutes"] = "ten"
    with pytest.raises(ValidationError):
        check(cluster)


def test_workers_have_gpus_and_come_only_when_needed(cluster: dict[str, Any]) -> None:
    worker = check(cluster)["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert 1 <= worker["max_workers"] <= cluster["max_workers"]


def test_every_node_has_the_project_the_token_and_the_shared_folder(
    cluster: dict[str, Any],
) -> None:
    mounts = dict(cluster["file_mounts"])
    assert mounts.pop("/home/ubuntu/.ray/auth_token") == "~/.ray/auth_token"
    for remote, local in mounts.items():
        assert remote == f"/home/ubuntu/gptray-source/{local}"
        assert (PATH.parent / local).exists()
    assert {"gptray", "pyproject.toml"} <= set(mounts.values())
    setup = "\n".join(cluster["setup_commands"])
    assert "pip install -q ~/gptray-source" in setup
    assert "/mnt/gptray" in setup


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_the_token_and_no_open_port(cluster: dict[str, Any], commands: str) -> None:
    (start,) = [line for line in cluster[commands] if "ray start" in line]
    assert "RAY_AUTH_MODE=token ray start" in start
    assert "0.0.0.0" not in start
    assert "security_group" in cluster["provider"]
    assert "IpPermissions" not in cluster["provider"]["security_group"]
