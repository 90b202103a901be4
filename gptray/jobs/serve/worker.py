"""A replica as a deployment of Ray Serve; `gptray.jobs.serve.answering` answers its requests.

Serve config files name `application`, see configs/serve.yaml.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from gptray.config import Config, RunFailed, UserError, override
from gptray.jobs.cluster.ray_metrics import METRICS, Exporter
from gptray.jobs.cluster.resources import actor_options, worker_resources
from gptray.jobs.engine_plan import check_engine_backend
from gptray.jobs.serve.check import api_keys, replicas_compute

if TYPE_CHECKING:
    from starlette.types import ASGIApp

APPLICATION = "gptray"
# Far more requests than fit in the engine's queue: the replica itself refuses those beyond, since
# it knows when there will be room, and a body that is still arriving takes no place in the queue.
# Still more wait in Serve's proxy, which would send them all at once.
ONGOING_REQUESTS, QUEUED_REQUESTS, QUEUED_RETRY_S = 20_000, 2_000, 10
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S, METRICS_S = 1.0, 30.0, 5.0
# Ray itself exports metrics every ten seconds.
EVERY_S = 5.0


def application(args: Mapping[str, object]) -> object:
    """The Serve application for a config file. args: config keys, dotted.

    The deployment's user_config gives the model and its name. Raises ConfigError, UserError.
    """
    config = override(Config(), args)
    check_engine_backend(config)
    return bound(config, None)


def bound(config: Config, model: Mapping[str, str] | None) -> object:
    """The application for a config. model: its deployment's user_config."""
    settings, reserved = config.serve, worker_resources(replicas_compute(config))
    scaling: dict[str, object] = {"num_replicas": settings.num_replicas}
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
        ray_actor_options=actor_options(config.compute, reserved),
        max_ongoing_requests=ONGOING_REQUESTS,
        max_queued_requests=QUEUED_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": QUEUED_RETRY_S},
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        # A replica that fails to start would fail again; lost nodes do not count as failures.
        max_constructor_retry_count=1,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    threads = max(1, int(reserved["CPU"]))
    return deployment.bind(config, api_keys(config), threads)


class News(NamedTuple):
    """A replica's name, its requests in flight, and all its lines for the job's log with levels."""

    replica: str
    active: int
    lines: list[tuple[int, str]]


class Replica:
    """The class that Serve runs, in its own process; see `Answering`."""

    def __init__(self, config: Config, keys: Sequence[str], threads: int) -> None:
        from gptray.jobs.serve.answering import Answering

        self._answering = Answering(
            config, keys, threads, on_first_token=lambda s: self._exporting.first_token(s)
        )
        self._exporting = Exporting(self._answering.metrics, lambda: self._answering.model_name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._answering.app(self._all_metrics)

    async def reconfigure(self, model: dict[str, str]) -> None:
        try:
            await self._answering.reconfigure(model)
        except (UserError, RunFailed) as error:
            # Serve keeps only the beginning of a traceback; without ours, it includes the reason.
            raise error.with_traceback(None) from None

    def backend(self) -> str | None:
        return self._answering.backend

    def news(self) -> News:
        answering = self._answering
        return News(serve.get_replica_context().replica_tag, answering.active, answering.news)

    def own_metrics(self) -> tuple[str, bytes]:
        """This replica's name and metrics."""
        return serve.get_replica_context().replica_tag, self._answering.metrics()

    async def _all_metrics(self) -> bytes:
        """All replicas' metrics, since a request for them goes to any replica."""
        here = serve.get_replica_context()
        handle = serve.get_deployment_handle(here.deployment, here.app_name)
        asked = handle.broadcast("own_metrics")
        found = await asked.results_async(timeout_s=METRICS_S, return_exceptions=True)
        # A replica that has just died has none.
        return self._answering.joined(dict(one for one in found if isinstance(one, tuple)))

    def check_health(self) -> None:
        """Raise if the engine has stopped, so that Serve replaces the replica."""
        self._answering.check_health()

    async def drain(self, timeout_s: float) -> int:
        return await self._answering.drain(timeout_s)


class Exporting:
    """Copies the endpoint's metrics to Ray's in a thread of the replica."""

    def __init__(self, text: Callable[[], bytes], model: Callable[[], str | None]) -> None:
        """text: returns the replica's metrics. model: returns the served model's name."""
        self._text, self._model = text, model
        self._counted: dict[tuple[str, ...], float] = {}
        self._exporters: dict[str, Exporter] = {}
        threading.Thread(target=self._follow, name="metrics", daemon=True).start()

    def first_token(self, seconds: float) -> None:
        """Record how long a request waited for its first token."""
        if exporter := self._exporter():
            exporter.observe("gptray_first_token_seconds", seconds)

    def _exporter(self) -> Exporter | None:
        name = self._model()
        if name and name not in self._exporters:
            self._exporters[name] = Exporter(name)
        return self._exporters[name] if name else None

    def _follow(self) -> None:
        pause = threading.Event()
        while not pause.wait(EVERY_S):
            if exporter := self._exporter():
                self._copy(exporter)

    def _copy(self, exporter: Exporter) -> None:
        for family in text_string_to_metric_families(self._text().decode()):
            if family.name not in METRICS or family.type == "histogram":
                continue
            for sample in family.samples:
                if family.type == "gauge":
                    exporter.set(family.name, sample.value, **sample.labels)
                elif sample.name.endswith("_total"):
                    key = (family.name, *sample.labels.values())
                    exporter.add(
                        family.name, sample.value - self._counted.get(key, 0.0), **sample.labels
                    )
                    self._counted[key] = sample.value
