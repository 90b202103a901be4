"""An engine behind the routes as a deployment of Ray Serve; what answers is in `gptray.serving`.

`application` is what a Serve config file names, see configs/serve.yaml.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptray.config import Config, UserError, override
from gptray.config.suggest import did_you_mean, nearest
from gptray.jobs.cluster import worker_resources
from gptray.jobs.generate.output import with_backend
from gptray.jobs.models import find_model
from gptray.jobs.serve.check import api_keys, name_of, replicas_compute
from gptray.serving.keys import Keys

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gptray.serving.endpoint import Served

# Serve keeps what replicas log here.
log = logging.getLogger("ray.serve")

USER_CONFIG = ("model", "served_model_name")
# Far more requests than fit in the engine's queue: the replica refuses the rest itself, since it
# knows when there will be room, and a body that is still arriving takes nobody's place. Beyond that
# Serve's proxy holds some, which it would all send at once.
ONGOING_REQUESTS, QUEUED_REQUESTS, QUEUED_RETRY_S = 20_000, 2_000, 10
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S, METRICS_S = 1.0, 30.0, 5.0


@dataclass(frozen=True)
class ReplicaTask:
    """What a replica is given. keys: digests of the API keys, as their file had them at the start.

    threads: of PyTorch.
    """

    config: Config
    keys: list[str]
    threads: int


def application(args: Mapping[str, Any]) -> Any:
    """The Serve application of a config file: args are keys of the config, dotted.

    The model and its name come as the deployment's user_config. Raises ConfigError, UserError.
    """
    return bound(with_backend(override(Config(), args)), None)


def bound(config: Config, model: Mapping[str, str] | None) -> Any:
    """The application as a config wants it; model: the user_config of its deployment."""
    from ray import serve

    settings, reserved = config.serve, worker_resources(replicas_compute(config))
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
        user_config=model and dict(model),
        ray_actor_options={"num_cpus": reserved["CPU"], "num_gpus": reserved.get("GPU", 0.0)},
        max_ongoing_requests=ONGOING_REQUESTS,
        max_queued_requests=QUEUED_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": QUEUED_RETRY_S},
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    threads = max(1, int(reserved["CPU"]))
    return deployment.bind(ReplicaTask(config, api_keys(config), threads))


class Replica:
    """An engine behind the routes, in a process of its own."""

    def __init__(self, task: ReplicaTask) -> None:
        import torch

        from gptray.serving.endpoint import Endpoint
        from gptray.serving.telemetry import Telemetry

        torch.set_num_threads(task.threads)
        self._config, self._keys = task.config, task.keys
        self._endpoint = Endpoint()
        self._telemetry = Telemetry(self._endpoint)
        self._model: dict[str, str] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from gptray.serving.app import make_app

        path = self._config.serve.api_key_file
        return make_app(
            self._endpoint,
            self._config.serve,
            keys=Keys(path, self._keys) if path else None,
            telemetry=self._telemetry,
            metrics=self._all_metrics,
        )

    async def reconfigure(self, model: dict[str, str]) -> None:
        """Serve this model from now on; requests in flight end on the one before.

        Raises UserError if it fails to load and there is none before, which else stays: Serve
        stops a replica that raises, and the model in use with it.
        """
        if model == self._model:
            return
        try:
            # In a thread that ends: OpenMP counts the threads of one that stays, finds more than
            # there are cores, and from then on the engine's fall asleep wherever they meet.
            with ThreadPoolExecutor(1) as passing:
                loop = asyncio.get_running_loop()
                served = await loop.run_in_executor(passing, self._load, model)
        except UserError as error:
            if self._model is None:
                raise
            log.error("%s stays: %s", self._model["model"], error)
            return
        self._endpoint.serve(served)
        self._model = model

    def _load(self, model: Mapping[str, str]) -> Served:
        from gptray.serving.endpoint import Served

        _check_keys(model)
        folder, place = find_model(self._config, model["model"], key="user_config: model")
        name = model.get("served_model_name") or name_of(place)
        return Served.load(folder, name, self._config)

    def own_metrics(self) -> tuple[str, bytes]:
        """What this replica counts, and its name."""
        from ray import serve

        return serve.get_replica_context().replica_tag, self._telemetry.text()

    async def _all_metrics(self) -> bytes:
        """What all replicas count: who asks for it is sent to any of them."""
        from ray import serve

        from gptray.serving.telemetry import side_by_side

        here = serve.get_replica_context()
        handle = serve.get_deployment_handle(here.deployment, here.app_name)
        found = handle.broadcast("own_metrics").results_async(timeout_s=METRICS_S)
        return side_by_side(dict(await found))

    def check_health(self) -> None:
        """Ray Serve asks; it replaces a replica of which this raises."""
        served = self._endpoint.served
        if served is not None and not served.thread.alive:
            raise RuntimeError("the engine has stopped")

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those in flight; how many did not end in time."""
        return await self._endpoint.drain(timeout_s)


def _check_keys(model: Mapping[str, str]) -> None:
    """Raise UserError for a user_config that is not what `user_config` makes."""
    for key in model.keys() - set(USER_CONFIG):
        near = nearest(key, USER_CONFIG)
        raise UserError(f"user_config: unknown key {key}{did_you_mean([near] if near else [])}")
    if "model" not in model:
        raise UserError("user_config: model is missing")
