"""What a replica counts, exported through Ray too, next to the metrics of other jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from gptray.jobs.ray_metrics import METRICS, Exporter

# Ray itself passes metrics on every ten seconds.
EVERY_S = 5.0


class Exporting:
    """Copies the endpoint's own metrics into Ray's, from a thread of the replica."""

    def __init__(self, text: Callable[[], bytes], model: Callable[[], str | None]) -> None:
        """text: what the replica counts; model: the name of the model that it serves."""
        self._text, self._model = text, model
        self._counted: dict[tuple[str, ...], float] = {}
        self._exporters: dict[str, Exporter] = {}
        threading.Thread(target=self._follow, name="metrics", daemon=True).start()

    def first_token(self, seconds: float) -> None:
        """A request has waited so long for its first token."""
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
