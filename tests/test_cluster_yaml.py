"""What is shipped for Ray's cluster launcher, against the schema that it checks configs with."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
PATHS = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "configs" / "clusters" / "gcp.yaml",
    "local": ROOT / "configs" / "clusters" / "on-premise.yaml",
}
CLOUDS = ["aws", "gcp"]
AWS_SETUP = ROOT / "configs" / "clusters" / "aws-setup.sh"


def read(provider: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(PATHS[provider].read_text(encoding="utf-8"))
    return config


@pytest.fixture(params=PATHS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of the configs."""
    return read(request.param)


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Ray's defaults and validate, as `ray up` does first."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("provider", PATHS)
def test_ray_accepts_it(provider: str) -> None:
    prepared = check(read(provider))
    assert prepared["provider"]["type"] == provider
    assert prepared["max_workers"] > 0
    if provider in CLOUDS:
        assert prepared["available_node_types"]["head"]["max_workers"] == 0


TYPOS: list[tuple[str, list[str], str, str]] = [
    # A provider, where, a key and a typo of it.
    ("aws", [], "max_workers", "max_worker"),
    ("aws", [], "head_node_type", "head_node_types"),
    ("aws", [], "setup_commands", "setup_command"),
    ("aws", [], "rsync_filter", "rsync_filters"),
    ("aws", ["auth"], "ssh_user", "ssh_usr"),
    ("aws", ["provider", "security_group"], "GroupName", "GroupNames"),
    ("aws", ["available_node_types", "gpu_worker"], "min_workers", "min_worker"),
    ("aws", ["available_node_types", "gpu_worker"], "node_config", "node_configs"),
    ("gcp", [], "idle_timeout_minutes", "idle_timeout_minute"),
    ("gcp", [], "head_start_ray_commands", "head_start_ray_command"),
    ("gcp", ["available_node_types", "head"], "resources", "resource"),
    ("local", [], "file_mounts", "file_mount"),
    ("local", ["auth"], "ssh_private_key", "ssh_privat_key"),
    ("local", [], "worker_start_ray_commands", "worker_start_commands"),
]


@pytest.mark.parametrize(("provider", "section", "key", "typo"), TYPOS, ids=[t[3] for t in TYPOS])
def test_mistyped_key_is_refused(provider: str, section: list[str], key: str, typo: str) -> None:
    config = place = read(provider)
    for name in section:
        place = place[name]
    place[typo] = place.pop(key)
    with pytest.raises(ValidationError, match=typo):
        check(config)


@pytest.mark.parametrize(
    ("key", "value"), [("idle_timeout_minutes", "ten"), ("max_workers", "4"), ("rsync_filter", "x")]
)
def test_wrong_type_is_refused(cluster: dict[str, Any], key: str, value: str) -> None:
    cluster[key] = value
    with pytest.raises((ValidationError, TypeError)):
        check(cluster)


@pytest.mark.parametrize("provider", CLOUDS)
def test_workers_have_gpus_and_come_only_when_needed(provider: str) -> None:
    cluster = read(provider)
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
        assert (ROOT / local).exists()
    assert {"gptray", "configs", "pyproject.toml", "constraints.txt"} <= set(mounts.values())
    setup = "\n".join(cluster["setup_commands"])
    assert "pip install -q ~/gptray-source -c ~/gptray-source/constraints.txt" in setup
    assert "mountpoint -q /mnt/gptray || sudo mount -t nfs" in setup


def test_a_node_has_a_compiler_and_waits_for_its_first_update(cluster: dict[str, Any]) -> None:
    (install,) = [line for line in cluster["setup_commands"] if "apt-get" in line and "-y" in line]
    assert "-o DPkg::Lock::Timeout=300" in install
    assert {"g++", "python3-dev", "nfs-common"} <= set(install.split())
    (update,) = [line for line in cluster["setup_commands"] if "apt-get update" in line]
    assert cluster["setup_commands"].index(update) < cluster["setup_commands"].index(install)


@pytest.mark.parametrize("provider", PATHS)
def test_the_driver_and_the_choice_for_cuda_12_are_named(provider: str) -> None:
    text = PATHS[provider].read_text(encoding="utf-8")
    (install,) = [line for line in read(provider)["setup_commands"] if "TORCH=" in line]
    assert "TORCH=cu130;" in install and "download.pytorch.org/whl/$TORCH" in install
    assert "580 or later" in text and "cu126" in text


@pytest.mark.parametrize("provider", PATHS)
def test_storage_is_a_folder_that_nodes_mount_or_a_bucket(provider: str) -> None:
    text = PATHS[provider].read_text(encoding="utf-8")
    places = set(re.findall(r"storage_path=([^\s,.]+)", text))
    buckets = {"aws": {"s3://BUCKET/runs"}, "gcp": {"gs://BUCKET/runs"}}
    assert places == {"/mnt/gptray"} | buckets.get(provider, set())


def test_aws_nodes_may_save_in_the_bucket_that_the_script_is_given() -> None:
    script = AWS_SETUP.read_text(encoding="utf-8")
    assert "SAVE_TO=BUCKET bash" in script and "SAVE_TO, aws-setup.sh" in PATHS["aws"].read_text()
    assert {"s3:PutObject", "s3:DeleteObject"} <= set(re.findall(r"s3:\w+", script))


def test_aws_nodes_have_the_profiles_and_the_group_that_the_script_makes() -> None:
    cluster, script = read("aws"), AWS_SETUP.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(AWS_SETUP)], check=True)
    made = {
        name: set(rest.split()) for name, rest in re.findall(r"^make_role (\S+) (.+)", script, re.M)
    }
    for kind, node in cluster["available_node_types"].items():
        profile = node["node_config"]["IamInstanceProfile"]["Name"]
        assert "AmazonS3ReadOnlyAccess" in made[profile]
        assert ("AmazonEC2FullAccess" in made[profile]) == (kind == "head")
    assert f"--group-name {cluster['provider']['security_group']['GroupName']} " in script
    assert "--port 22 --cidr" in script and "0.0.0.0" not in script
    assert "iam:PassRole" in script


def test_what_an_aws_account_must_allow_is_named() -> None:
    text = PATHS["aws"].read_text(encoding="utf-8")
    assert "All G and VT Spot Instance Requests" in text and "L-3819A6DF" in text


def test_gcp_workers_have_an_account_to_read_with() -> None:
    cluster = read("gcp")
    project = cluster["provider"]["project_id"]
    (account,) = cluster["available_node_types"]["gpu_worker"]["node_config"]["serviceAccounts"]
    assert account["email"] == f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_the_token_and_no_open_port(cluster: dict[str, Any], commands: str) -> None:
    (start,) = [line for line in cluster[commands] if "ray start" in line]
    assert "RAY_AUTH_MODE=token ray start" in start
    assert "0.0.0.0" not in start
    assert "IpPermissions" not in cluster["provider"].get("security_group", {})
