"""A replica's engine behind the routes of `gptray.serving`. No Ray here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from starlette.types import ASGIApp

from gptray.config import Config, RunFailed, UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.jobs.models import find_model
from gptray.jobs.serve.check import USER_CONFIG, WATCH_S, name_of
from gptray.model.adapter import Base
from gptray.serving.adapter_watch import AdapterWatch
from gptray.serving.api_keys import Keys
from gptray.serving.app import make_app
from gptray.serving.endpoint import Endpoint, Served
from gptray.serving.telemetry import Telemetry, side_by_side

# Serve records what a replica logs here.
log = logging.getLogger("ray.serve")

T = TypeVar("T")


class Answering:
    """One replica's engine and routes; its model can be replaced.

    keys: digests of the API keys in their file at the start. threads: PyTorch's.
    """

    def __init__(
        self,
        config: Config,
        keys: Sequence[str],
        threads: int,
        *,
        on_first_token: Callable[[float], None],
    ) -> None:
        torch.set_num_threads(threads)
        self._config, self._keys = config, keys
        self._endpoint = Endpoint()
        self._telemetry = Telemetry(self._endpoint, on_first_token=on_first_token)
        self._told: list[tuple[int, str]] = []
        self._model: Mapping[str, str] | None = None
        self._watching: asyncio.Task[None] | None = None

    def app(self, metrics: Callable[[], Awaitable[bytes]]) -> ASGIApp:
        """The routes. metrics: returns all replicas' metrics, for /metrics."""
        path = self._config.serve.api_key_file
        return make_app(
            self._endpoint,
            self._config.serve,
            keys=Keys(path, self._keys) if path else None,
            telemetry=self._telemetry,
            metrics=metrics,
        )

    async def reconfigure(self, model: Mapping[str, str]) -> None:
        """Serve this model from now on; requests in flight finish on the previous one.

        If it fails to load, the previous model keeps serving, because raising would make Serve stop
        the replica. Raises UserError or RunFailed if there is no previous model.
        """
        if model == self._model:
            return
        try:
            served, watch = await _in_short_lived_thread(lambda: self._load(model))
        except (UserError, RunFailed) as error:
            if self._model is None:
                raise
            log.error("still serving %s: %s", self._model["model"], error)
            return
        if self._watching:
            self._watching.cancel()
        self._endpoint.serve(served)
        self._model = model
        self._watching = asyncio.create_task(self._keep_scanning(watch)) if watch else None

    def _load(self, model: Mapping[str, str]) -> tuple[Served, AdapterWatch | None]:
        _check_keys(model)
        folder, place = find_model(self._config, model["model"], key="user_config: model")
        name = model.get("served_model_name") or name_of(place)
        served, adapters = Served.load(folder, name, self._config), self._config.serve.adapters
        if not isinstance(adapters, str):
            return served, None
        watch = AdapterWatch(adapters, served, Base.of(str(folder)))
        self._tell(watch.scan())
        return served, watch

    async def _keep_scanning(self, watch: AdapterWatch) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self._tell(await _in_short_lived_thread(watch.scan))

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            log.warning("%s", line)
            self._told.append((logging.INFO, line))

    @property
    def news(self) -> list[tuple[int, str]]:
        """All lines so far for the job's log, with their levels: of adapters, of a dead engine."""
        served = self._endpoint.served
        error = served.thread.error if served else None
        if error is None:
            return self._told
        why = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        ended = f"an engine has stopped, and Ray Serve starts another: {why}"
        return [*self._told, (logging.ERROR, ended)]

    @property
    def active(self) -> int:
        """Requests in flight."""
        return self._endpoint.active

    @property
    def model_name(self) -> str | None:
        """The name of the served model; None before there is one."""
        return self._endpoint.served.name if self._endpoint.served else None

    @property
    def backend(self) -> str | None:
        """The engine's backend; None before there is a model."""
        return self._endpoint.served.engine.backend if self._endpoint.served else None

    def metrics(self) -> bytes:
        return self._telemetry.text()

    def joined(self, metrics: Mapping[str, bytes]) -> bytes:
        """Merge all replicas' metrics, given by name."""
        return side_by_side(metrics)

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has stopped."""
        served = self._endpoint.served
        if served is not None and not served.thread.alive:
            raise RuntimeError("the engine has stopped") from served.thread.error
        if self._watching and self._watching.done() and not self._watching.cancelled():
            raise RuntimeError("serve.adapters is not watched") from self._watching.exception()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for those in flight; return how many did not end in time."""
        return await self._endpoint.drain(timeout_s)


async def _in_short_lived_thread(work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread that then ends.

    If the thread stayed, OpenMP would count its team too, find more threads than cores, and make
    the engine's threads sleep at every barrier.
    """
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def _check_keys(model: Mapping[str, str]) -> None:
    """Raise UserError for a user_config with unknown or missing keys."""
    for key in model.keys() - set(USER_CONFIG):
        near = nearest(key, USER_CONFIG)
        raise UserError(f"user_config: unknown key {key}{did_you_mean(near)}")
    if "model" not in model:
        raise UserError("user_config: model is missing")
