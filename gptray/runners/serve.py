"""The HTTP endpoint on Ray Serve: replicas, each with an engine, behind Serve's proxy.

`serve` runs it for the time of a job; `application` is what a Serve config file names, see
configs/serve.yaml. What answers a request is in `gptray.serving`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptray.config import ComputeConfig, Config, RunFailed, UserError, override
from gptray.generation.build import library
from gptray.model.shape import read_shape
from gptray.runners.cluster import check_resources, ray_cluster, worker_resources
from gptray.runners.models import find_model, open_model
from gptray.runners.output import with_backend
from gptray.serving.keys import read_keys
from gptray.suggest import did_you_mean, nearest

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger("gptray")

APPLICATION = "gptray"
# Requests that a replica takes beyond those that find room in its line, to refuse them itself.
SPARE_REQUESTS = 64
# Serve's own limits come this much later than the endpoint's, which answers in the client's form.
SPARE_S = 10.0
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 1.0, 30.0
START_S, POLL_S = 60.0, 1.0


def serve(config: Config, *, answers: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish.

    answers: is given the JSON line's facts as soon as the endpoint generates.
    Raises UserError for what cannot start, RunFailed when it does not come up or goes away,
    KeyboardInterrupt after Ctrl-C.
    """
    config = check_endpoint(config)
    if config.generate.backend == "native":
        library()
    url, model = _url(config), _user_config(config)
    with ray_cluster(), _started(config, model):
        _wait_until_healthy(url)
        with _sigterm_sets() as stop:
            answers({"url": url, "model": model["served_model_name"]})
            log.info("serving %s at %s", model["model"], url)
            try:
                while not stop.wait(POLL_S):
                    _check_running()
            except KeyboardInterrupt:
                _drain(config.serve.drain_timeout_s)
                raise
            _drain(config.serve.drain_timeout_s)


def serving_plan(config: Config) -> list[tuple[str, str]]:
    """What the job would do, without torch or Ray; raises UserError as the job would."""
    config = check_endpoint(config)
    settings, model = config.serve, _user_config(config)
    least, most = settings.num_replicas, settings.max_replicas
    replicas = f"{least} to {most}" if most else str(least)
    return [
        ("model", f"{model['model']}, called {model['served_model_name']}"),
        ("url", _url(config)),
        ("engines", f"{replicas}, of {settings.max_batch_size} sequences"),
        ("backend", config.generate.backend),
        ("api key", "needed" if settings.api_key_file else "not needed"),
    ]


def check_endpoint(config: Config) -> Config:
    """Look at all that can be seen before Ray starts; return the config with its backend picked.

    Raises UserError with all that is wrong, one line each.
    """
    problems = []
    for check in (_check_model, _check_address, _keys, _check_compute, with_backend):
        try:
            check(config)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return with_backend(config)


def _check_model(config: Config) -> None:
    folder, _ = find_model(config, config.serve.model, key="serve.model")
    n_positions, most = read_shape(folder)["n_positions"], config.serve.max_output_tokens
    if most is not None and most > n_positions:
        raise UserError(
            f"serve.max_output_tokens={most} is more than the model's context of {n_positions} "
            "tokens holds"
        )


def _check_address(config: Config) -> None:
    """Refuse an address that cannot be listened on here; nodes of a cluster are not looked at."""
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
        raise UserError(
            f"serve.port={port} cannot be listened on at {host}: {error.strerror}"
        ) from None


def _keys(config: Config) -> list[str]:
    return read_keys(config.serve.api_key_file) if config.serve.api_key_file else []


def _check_compute(config: Config) -> None:
    check_resources(_compute(config))


def _compute(config: Config) -> ComputeConfig:
    most = config.serve.max_replicas or config.serve.num_replicas
    return config.compute.model_copy(update={"num_workers": most})


def _user_config(config: Config) -> dict[str, str]:
    """What a replica is told to serve: all that a new model under the same address changes."""
    _, source = find_model(config, config.serve.model, key="serve.model")
    folder = Path(source).expanduser().absolute()
    named = folder.parent.name if folder.name == "model" else folder.name
    return {
        "model": str(folder) if folder.exists() else source,
        "served_model_name": config.serve.served_model_name or named,
    }


def _url(config: Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.serve.host, config.serve.host)
    return f"http://{host}:{config.serve.port}"


def application(args: Mapping[str, Any]) -> Any:
    """The Serve application of a config file: args are keys of the config, dotted.

    The model and its name come as the deployment's user_config. Raises ConfigError, UserError.
    """
    return _application(with_backend(override(Config(), args)), None)


def _application(config: Config, model: dict[str, str] | None) -> Any:
    from ray import serve

    settings, reserved = config.serve, worker_resources(_compute(config))
    room = settings.max_batch_size + settings.max_waiting + SPARE_REQUESTS
    scaling: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.max_batch_size,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        **scaling,
        user_config=model,
        ray_actor_options={"num_cpus": reserved["CPU"], "num_gpus": reserved.get("GPU", 0.0)},
        max_ongoing_requests=room,
        max_queued_requests=room,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    threads = max(1, int(reserved["CPU"]))
    return deployment.bind(config.model_dump(mode="json"), _keys(config), threads)


class Replica:
    """An engine behind the routes, in a process of its own."""

    def __init__(self, config: dict[str, Any], keys: list[str], threads: int) -> None:
        import torch

        from gptray.serving.endpoint import Endpoint

        torch.set_num_threads(threads)
        self._config, self._keys = Config.model_validate(config), keys
        self._endpoint = Endpoint()
        self._model: dict[str, str] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from gptray.serving.app import make_app

        return make_app(self._endpoint, self._config.serve, keys=self._keys)

    async def reconfigure(self, model: dict[str, str]) -> None:
        """Serve this model from now on; requests in flight end on the one before."""
        from gptray.serving.endpoint import Served

        if model == self._model:
            return
        for key in model.keys() - {"model", "served_model_name"}:
            near = nearest(key, ("model", "served_model_name"))
            raise UserError(f"user_config: unknown key {key}{did_you_mean([near] if near else [])}")
        folder = open_model(model["model"], key="user_config: model")
        name = model.get("served_model_name", APPLICATION)
        self._endpoint.serve(await asyncio.to_thread(Served.load, folder, name, self._config))
        self._model = model

    def check_health(self) -> None:
        """Ray Serve asks; it replaces a replica of which this raises."""
        served = self._endpoint.served
        if served is not None and not served.thread.alive:
            raise RuntimeError("the engine has stopped")

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those in flight; how many did not end in time."""
        return await self._endpoint.drain(timeout_s)


@contextmanager
def _started(config: Config, model: dict[str, str]) -> Iterator[None]:
    """Have the application on Ray Serve; afterwards Serve is as it was before."""
    from ray import serve

    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    before = serve.status()
    if APPLICATION in before.applications:
        raise UserError(f"the cluster serves an application {APPLICATION!r} already")
    serve.start(
        http_options={
            "host": config.serve.host,
            "port": config.serve.port,
            "request_timeout_s": config.serve.request_timeout_s + SPARE_S,
        }
    )
    try:
        try:
            serve.run(_application(config, model), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise RunFailed(f"the endpoint did not start: {error}") from None
        yield
    finally:
        if before.proxies:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()


def _wait_until_healthy(url: str) -> None:
    """Return when the endpoint generates."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while True:
        try:
            direct.open(f"{url}/health", timeout=START_S).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"{url}/health did not answer: {error}") from None
            time.sleep(0.1)


@contextmanager
def _sigterm_sets() -> Iterator[threading.Event]:
    """An event that SIGTERM sets meanwhile."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_running() -> None:
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    if found is None:
        raise RunFailed("the endpoint was deleted from the cluster")


def _drain(timeout_s: float) -> None:
    """Have all replicas finish what they have begun, and refuse what is new."""
    from ray import serve

    log.info("no more requests are taken; those that run have %g s", timeout_s)
    replicas = serve.get_app_handle(APPLICATION).broadcast("drain", timeout_s)
    cut = sum(replicas.results(timeout_s=timeout_s + SPARE_S))
    if cut:
        log.warning("%d requests did not end in time", cut)
