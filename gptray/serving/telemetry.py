"""The endpoint's metrics, in Prometheus's format. They never contain text of a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gptray.serving.endpoint import Endpoint
from gptray.serving.streams import Update

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Telemetry:
    """One server's metrics; the engine's own counters are read when they are collected."""

    def __init__(
        self, endpoint: Endpoint, *, on_first_token: Callable[[float], None] | None = None
    ) -> None:
        """on_first_token: receives the seconds to the first token of each request."""
        self.on_first_token = on_first_token
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCounters(endpoint))
        self.requests = Counter("gptray_requests", "answers", ["path", "status"], registry=registry)
        self.tokens_in = Counter("gptray_prompt_tokens", "tokens of prompts", registry=registry)
        self.tokens_out = Counter("gptray_output_tokens", "tokens generated", registry=registry)
        self.first_token = Histogram(
            "gptray_first_token_seconds",
            "from a request's arrival to its first token",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self.per_token = Histogram(
            "gptray_per_token_seconds",
            "between two tokens of an output",
            buckets=TOKEN_S,
            registry=registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


def side_by_side(texts: Mapping[str, bytes]) -> bytes:
    """Merge the metrics of several servers into one text, with each server's name as a label."""
    found: dict[str, Metric] = {}
    for server, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            kept = found.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                kept.add_sample(sample.name, {**sample.labels, "server": server}, sample.value)
    return generate_latest(_Found(found.values()))


class _Found(Collector):
    """A collector of given metrics."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class Stopwatch:
    """Times the tokens of one request from its arrival."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._began = time.monotonic()
        self._last: dict[int, float] = {}

    def take(self, update: Update) -> None:
        """Count an update's tokens. Those of one update share the time since the last update."""
        tokens = len(update.drawn) + (update.end is not None)
        if not tokens:
            return
        now = time.monotonic()
        if not self._last:
            self._telemetry.first_token.observe(now - self._began)
            if self._telemetry.on_first_token:
                self._telemetry.on_first_token(now - self._began)
        # The first token of an output has no predecessor to time it from.
        gaps = tokens if update.index in self._last else tokens - 1
        elapsed = now - self._last.get(update.index, now)
        for _ in range(gaps):
            self._telemetry.per_token.observe(elapsed / gaps)
        self._last[update.index] = now
        self._telemetry.tokens_out.inc(tokens)


class _EngineCounters(Collector):
    """The current engine's counters, which restart at 0 with another model."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def collect(self) -> Iterator[Metric]:
        served = self._endpoint.served
        if served is None:
            return
        thread = served.thread
        for name, what, value in (
            ("gptray_sequences_running", "sequences in the batch", thread.running),
            ("gptray_sequences_waiting", "sequences waiting for a slot", thread.waiting),
            ("gptray_batch_size", "sequences that fit in a batch", served.engine.max_batch_size),
        ):
            yield GaugeMetricFamily(name, what, value)
        yield CounterMetricFamily("gptray_steps", "steps of the engine", thread.steps)
        # Occupancy: rate(gptray_step_sequences) / rate(gptray_steps) / gptray_batch_size.
        yield CounterMetricFamily(
            "gptray_step_sequences", "sequences that drew a token, summed over steps", thread.rows
        )
