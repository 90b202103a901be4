"""The metrics that jobs export to Prometheus through Ray: their table, and the exporter.

Every node of a Ray cluster serves its processes' metrics on its metrics port, where the cluster's
Prometheus reads them. `configs/grafana/gptray.json` is a dashboard for them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import printable
from typing import Literal, Protocol, cast
from urllib.parse import quote

from ray.util import metrics

from gptray.storage.record import MetricsRow


@dataclass(frozen=True)
class Metric:
    """A metric that jobs export; all also have the tag `run`.

    field: the key in metrics.jsonl, for metrics that are exported from there.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    description: str
    tags: tuple[str, ...] = ()
    field: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus; for a histogram, the prefix of its names."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


# Every ten seconds, Ray exports what was set since the last time.
SET_AGAIN_S = 5.0
_NATS = "nats per token"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
METRICS = {
    metric.name: metric
    for metric in (
        # Training. `run` is the run's name, or SWEEP/TRIAL for a trial.
        Metric("gptray_step", "gauge", "steps", "last logged step", field="step"),
        Metric("gptray_max_steps", "gauge", "steps", "train.max_steps"),
        Metric("gptray_epoch", "gauge", "epochs", "passes over the text", field="epoch"),
        Metric("gptray_train_loss", "gauge", _NATS, "training loss", field="train_loss"),
        Metric("gptray_val_loss", "gauge", _NATS, "validation loss", field="val_loss"),
        Metric("gptray_val_bpb", "gauge", "bits per byte", "validation loss", field="val_bpb"),
        Metric("gptray_gap", "gauge", _NATS, "validation loss - training loss", field="gap"),
        Metric("gptray_lr", "gauge", "1", "learning rate", field="lr"),
        Metric("gptray_grad_norm", "gauge", "1", "before clipping", field="grad_norm"),
        Metric(
            "gptray_mfu", "gauge", "share", "share of the GPUs' peak arithmetic in use", field="mfu"
        ),
        Metric("gptray_train_steps", "counter", "steps", "steps made"),
        Metric(
            "gptray_train_seconds",
            "counter",
            "seconds",
            "where the first worker's time goes; see gptray.training.laps",
            tags=("part",),
        ),
        # Training, evaluating (tokens scored) and batches (tokens written).
        Metric(
            "gptray_tokens_per_sec",
            "gauge",
            "tokens per second",
            "of all workers",
            tags=("job",),
            field="tokens_per_sec",
        ),
        # Sweeps.
        Metric("gptray_trials", "gauge", "trials", "by state or outcome", tags=("state",)),
        Metric("gptray_best_bpb", "gauge", "bits per byte", "of the best trial so far"),
        Metric("gptray_trial_steps", "gauge", "steps", "of all trials"),
        # Evaluating and preparing: tokens scored, parts of the text read or written.
        Metric("gptray_done", "gauge", "share", "of what the job is doing", tags=("doing",)),
        # Batches.
        Metric("gptray_rows", "gauge", "rows", "done, failed (of those done), all", ("state",)),
        Metric("gptray_engines", "gauge", "engines", "that run"),
        # Batches (all engines together) and serving (per replica, where `run` is the model's name).
        Metric("gptray_sequences_running", "gauge", "sequences", "in the engines' batches"),
        Metric("gptray_sequences_waiting", "gauge", "sequences", "waiting for a slot"),
        Metric("gptray_batch_size", "gauge", "sequences", "that fit in the engines' batches"),
        Metric("gptray_output_tokens", "counter", "tokens", "generated"),
        # Serving.
        Metric("gptray_prompt_tokens", "counter", "tokens", "of prompts"),
        Metric("gptray_requests", "counter", "answers", "by path and status", ("path", "status")),
        Metric(
            "gptray_first_token_seconds",
            "histogram",
            "seconds",
            "from a request's arrival to its first token",
            buckets=FIRST_TOKEN_S,
        ),
    )
}
_FIELDS = {metric.field: metric.name for metric in METRICS.values() if metric.field}


_exporters: weakref.WeakSet[Exporter] = weakref.WeakSet()


@cache
def _keep_setting() -> None:
    """Start a thread that periodically sets all gauges of this process again."""

    def follow() -> None:
        pause = threading.Event()
        while not pause.wait(SET_AGAIN_S):
            for exporter in tuple(_exporters):
                exporter.set_again()

    threading.Thread(target=follow, name="metrics", daemon=True).start()


class _Series(Protocol):
    """The part of Ray's Gauge, Counter and Histogram that is used."""

    def set(self, value: float, tags: Mapping[str, str]) -> None: ...
    def inc(self, value: float, tags: Mapping[str, str]) -> None: ...
    def observe(self, value: float, tags: Mapping[str, str]) -> None: ...


class Exporter:
    """Sets the metrics of one run; does nothing without Ray.

    run: the tag `run`; percent-encoded where it is not ASCII, since Ray takes nothing else.
    Ray drops gauges that are not set for 20 seconds, so they are set again as long as the exporter
    exists.
    """

    def __init__(self, run: str) -> None:
        self._run = quote(run, safe=printable)
        self._series: dict[str, _Series] = {}
        # The values of gauges, by name and tags.
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        _exporters.add(self)
        _keep_setting()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._of(name).set(float(value), {"run": self._run, **tags})
        # Only now, so that the thread that sets these again never creates a series.
        self._values[name, frozenset(tags.items())] = float(value)

    def set_again(self) -> None:
        """Set every gauge to its current value again."""
        for (name, tags), value in tuple(self._values.items()):
            self._of(name).set(value, {"run": self._run, **dict(tags)})

    def add(self, name: str, value: float, **tags: str) -> None:
        """Increase a counter."""
        if value > 0:
            self._of(name).inc(float(value), {"run": self._run, **tags})

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add a value to a histogram."""
        self._of(name).observe(float(value), {"run": self._run, **tags})

    def row(self, row: MetricsRow) -> None:
        """Set the training gauges from a row of metrics.jsonl."""
        for field, value in cast(Mapping[str, float], row).items():
            if field == "tokens_per_sec":
                self.set(_FIELDS[field], value, job="train")
            elif field in _FIELDS:
                self.set(_FIELDS[field], value)

    def laps(self, steps: int, seconds: Mapping[str, float]) -> None:
        """Count steps, and the seconds of each part, see `gptray.training.laps`."""
        self.add("gptray_train_steps", steps)
        for part, passed in seconds.items():
            self.add("gptray_train_seconds", passed, part=part)

    def _of(self, name: str) -> _Series:
        if name not in self._series:
            metric = METRICS[name]
            kinds = {"gauge": metrics.Gauge, "counter": metrics.Counter}
            make = kinds.get(metric.kind, metrics.Histogram)
            buckets = {"boundaries": list(metric.buckets)} if metric.buckets else {}
            words = f"{metric.description} [{metric.unit}]"
            self._series[name] = make(name, words, tag_keys=("run", *metric.tags), **buckets)
        return self._series[name]


def run_tag(run_dir: Path) -> str:
    """The tag `run` of a run folder: its name, or SWEEP/TRIAL for a trial."""
    is_trial = run_dir.parent.name == "trials"
    return f"{run_dir.parent.parent.name}/{run_dir.name}" if is_trial else run_dir.name
