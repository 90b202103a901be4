"""Checks an endpoint before it starts: model, address, keys, resources. No torch, no Ray."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from gptray.config import ComputeConfig, Config, UserError
from gptray.jobs.adapters import check_adapters, with_adapters
from gptray.jobs.base import Mistakes, Plan
from gptray.jobs.cluster.machine import check_resources
from gptray.jobs.engine_plan import check_engine_backend, planned_backend, planned_memory
from gptray.jobs.models import find_model
from gptray.model.adapter import adapted_name
from gptray.model.example import FALLBACK
from gptray.model.shape import model_folder, read_shape
from gptray.serving.api_keys import read_keys
from gptray.serving.hosts import WILDCARDS
from gptray.storage.files import expanded, is_uri

# How often a folder of adapters is scanned.
WATCH_S = 2.0
# The keys of a deployment's user_config.
USER_CONFIG = ("model", "served_model_name")


@dataclass(frozen=True)
class CheckedEndpoint:
    """An endpoint that can start. model: its `user_config`."""

    config: Config
    model: Mapping[str, str]


def check(config: Config) -> CheckedEndpoint:
    """Check all that can be checked before Ray starts.

    Raises UserError with all mistakes, one line each.
    """
    mistakes, model = Mistakes(), dict[str, str]()
    with mistakes:
        config = with_adapters(config, "serve")
        model = user_config(config)
    with mistakes:
        _check_address(config)
    with mistakes:
        api_keys(config)
    with mistakes:
        check_resources(replicas_compute(config))
    with mistakes:
        check_engine_backend(config)
    mistakes.raise_any()
    return CheckedEndpoint(config, model)


def plan(checked: CheckedEndpoint) -> Plan:
    config, model = checked.config, checked.model
    settings = config.serve
    least, most = settings.num_replicas, settings.max_replicas
    replicas = f"{least} to {most}" if most else str(least)
    folder = model_folder(model["model"])
    return [
        ("model", f"{model['model']}, called {model['served_model_name']}"),
        *([("with adapters", _adapters(checked))] if settings.adapters else []),
        ("url", endpoint_url(config)),
        ("engines", f"{replicas}, of {settings.max_batch_size} sequences"),
        ("backend", planned_backend(config)),
        ("memory", planned_memory(config, folder, settings.max_batch_size)),
        ("hosts", _hosts(config)),
        ("api key", "needed" if settings.api_key_file else "not needed"),
    ]


def _adapters(checked: CheckedEndpoint) -> str:
    adapters = checked.config.serve.adapters or {}
    if isinstance(adapters, str):
        return f"those in {adapters}, rescanned every {WATCH_S:g} s"
    return ", ".join(adapted_name(checked.model["served_model_name"], name) for name in adapters)


def _hosts(config: Config) -> str:
    host, allowed = config.serve.host, config.serve.allowed_hosts
    if "*" in (allowed or ()) or (allowed is None and host in WILDCARDS):
        return "any"
    more = [allowed] if isinstance(allowed, str) else allowed or []
    return ", ".join(["localhost", "any address", *more])


def _check_address(config: Config) -> None:
    """Raise UserError for an address that cannot be bound here; a cluster's is not checked."""
    if os.environ.get("RAY_ADDRESS"):
        return
    host, port = config.serve.host, config.serve.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except socket.gaierror:
        raise UserError(f"serve.host={host}: there is no such address") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"serve.host={host} is not an address of this machine") from None
        raise UserError(f"serve.port={port}: cannot listen on {host}: {error.strerror}") from None


def api_keys(config: Config) -> list[str]:
    """Digests of the keys that the file has now. Raises UserError if it is unreadable."""
    return read_keys(config.serve.api_key_file) if config.serve.api_key_file else []


def replicas_compute(config: Config) -> ComputeConfig:
    """The resources of the most replicas."""
    most = config.serve.max_replicas or config.serve.num_replicas
    return config.compute.model_copy(update={"num_workers": most})


def user_config(config: Config) -> dict[str, str]:
    """A replica's model: all that changes when another model is served at the same address.

    Raises UserError for a model that does not exist, or whose context is too short.
    """
    found, source = find_model(config, config.serve.model, key="serve.model")
    check_adapters(config.serve.adapters, found, key="serve.adapters")
    n_positions, most = read_shape(found).n_positions, config.serve.max_output_tokens
    if most is not None and most > n_positions:
        raise UserError(
            f"serve.max_output_tokens={most} is more than the model's context of {n_positions} "
            "tokens holds"
        )
    folder = expanded(source).absolute()
    return {
        "model": str(folder) if folder.exists() else source,
        "served_model_name": config.serve.served_model_name or name_of(source),
    }


def name_of(source: str) -> str:
    """A model's name by its location: its run, its folder or its hub id."""
    path = expanded(source.partition("?")[0] if is_uri(source) else source).absolute()
    return path.parent.name if path.name == "model" else path.name


def completion_command(config: Config, url: str, model: str) -> str:
    """A curl command that requests a completion; it reads the API key from $KEY."""
    body = {"model": model, "prompt": FALLBACK, "max_tokens": 40}
    text = json.dumps(body, ensure_ascii=False)
    words = ["curl", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", text]
    key = ' -H "Authorization: Bearer $KEY"' if config.serve.api_key_file else ""
    return f"{shlex.join(words)}{key}"


def endpoint_url(config: Config) -> str:
    """The URL at which this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.serve.host, config.serve.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.serve.port}"
