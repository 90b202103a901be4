"""Kubernetes manifests and what is wrong with them, by KubeRay's, Ray's and gptray's schemas."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError
from ray.scripts.scripts import start
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from gptray.config import Config, ConfigError, override
from gptray.jobs.serve.check import USER_CONFIG
from gptray.jobs.serve.worker import Replica

Manifest = dict[str, Any]
API_VERSION = "ray.io/v1"
CLUSTER_AT = {
    "RayCluster": ["spec"],
    "RayJob": ["spec", "rayClusterSpec"],
    "RayService": ["spec", "rayClusterConfig"],
}
POD = ["properties", "headGroupSpec", "properties", "template"]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, as kubectl does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.YAMLError(f"duplicate key in {[key.value for key, _ in node.value]}")
        return found


def read(text: str) -> list[Manifest]:
    """The manifests of a file."""
    return list(yaml.load_all(text, Loader=_Loader))


def cluster_of(manifest: Manifest) -> Manifest:
    """The Ray cluster that a manifest asks for."""
    for key in CLUSTER_AT[manifest["kind"]]:
        manifest = manifest[key]
    return manifest


def groups_of(manifest: Manifest) -> list[Manifest]:
    """Head and workers."""
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def problems(manifest: Manifest) -> list[str]:
    """What Kubernetes, KubeRay, Ray or gptray would refuse or, worse, ignore."""
    kind = str(manifest.get("kind"))
    schema = schemas().get(kind)
    if schema is None:
        return [f"unknown kind {kind}"]
    errors = Draft202012Validator(schema).iter_errors(manifest)
    found = [f"{error.json_path}: {error.message}" for error in errors]
    if found or kind not in CLUSTER_AT:
        return found
    for group in groups_of(manifest):
        unknown = set(group.get("rayStartParams", {})) - ray_start_options()
        found += [f"rayStartParams: unknown {name}" for name in sorted(unknown)]
    if kind == "RayService":
        found += serve_problems(yaml.load(manifest["spec"]["serveConfigV2"], Loader=_Loader))
    return found


@cache
def schemas() -> dict[str, Manifest]:
    """The strict schema of each kind, see README.md beside this file.

    KubeRay's have pods, claims and services in them: from there come Kubernetes' own kinds.
    """
    path = Path(__file__).with_name("crds.json.gz")
    found = {
        kind: strict(one) for kind, one in json.loads(gzip.decompress(path.read_bytes())).items()
    }
    cluster = found["RayCluster"]["properties"]["spec"]
    pod = _at(cluster, *POD)
    head = cluster["properties"]["headGroupSpec"]["properties"]
    volume = _at(pod, "properties", "spec", "properties", "volumes", "items", "properties")
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]
    for kind, schema in found.items():
        schema["properties"]["kind"] = {"const": kind}
        schema["properties"]["apiVersion"] = {"const": API_VERSION}
        schema["properties"]["metadata"] = pod["properties"]["metadata"]
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    deployment = {
        "type": "object",
        "required": ["selector", "template"],
        "properties": {
            "replicas": {"type": "integer"},
            "selector": claim["properties"]["spec"]["properties"]["selector"],
            "strategy": {"properties": {"type": {"enum": ["Recreate", "RollingUpdate"]}}},
            "template": pod,
        },
        "additionalProperties": False,
    }
    found["PersistentVolumeClaim"] = _kind("v1", claim["properties"]["spec"], pod)
    found["Service"] = _kind("v1", head["headService"]["properties"]["spec"], pod)
    found["Deployment"] = _kind("apps/v1", deployment, pod)
    return found


def _kind(version: str, spec: Manifest, pod: Manifest) -> Manifest:
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": version},
            "kind": {},
            "metadata": pod["properties"]["metadata"],
            "spec": spec,
        },
        "additionalProperties": False,
    }


def _at(schema: Manifest, *keys: str) -> Manifest:
    for key in keys:
        schema = schema[key]
    return schema


def strict(schema: Manifest) -> Manifest:
    """The OpenAPI schema as a JSON Schema that refuses the keys that Kubernetes would drop."""
    found = dict(schema)
    if found.pop("nullable", False):
        found["type"] = [found["type"], "null"]
    if "properties" in found:
        found["properties"] = {name: strict(one) for name, one in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = strict(found[key])
    return found


@cache
def ray_start_options() -> frozenset[str]:
    """What `ray start` takes."""
    return frozenset(word.lstrip("-") for one in start.params for word in one.opts)


def serve_problems(config: Manifest) -> list[str]:
    """What Ray Serve or gptray would refuse or ignore of a Serve config."""
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [f"serveConfigV2: {error}"]
    found = list(_unknown(ServeDeploySchema, config))
    found += _unknown(HTTPOptionsSchema, config.get("http_options", {}))
    for application in config["applications"]:
        found += _unknown(ServeApplicationSchema, application)
        try:
            override(Config(), application.get("args", {}))
        except ConfigError as error:
            found.append(f"args: {error}")
        for deployment in application.get("deployments", []):
            found += _unknown(DeploymentSchema, deployment)
            if deployment["name"] != Replica.__name__:
                found.append(f"unknown deployment {deployment['name']}")
            if set(deployment.get("user_config", {})) != set(USER_CONFIG):
                found.append(f"user_config needs {USER_CONFIG}: {deployment}")
    return found


def _unknown(model: type[BaseModel], given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that Ray Serve ignores, for the sake of its later versions."""
    yield from (
        f"{model.__name__}: unknown {key}" for key in given if key not in model.model_fields
    )
