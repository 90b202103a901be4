"""The dashboard for Grafana names what jobs export, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptray.jobs.cluster.ray_metrics import METRICS, Metric
from gptray.training.laps import PARTS
from gptray.tuning.sweep_record import STATES

PATH = Path(__file__).resolve().parent.parent / "configs" / "grafana" / "gptray.json"
BOARD: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
EXPORTED = {metric.exported: metric for metric in METRICS.values()}


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each metric of a PromQL expression, with its label matchers by label."""
    for name, inside in re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression):
        yield name, dict(re.findall(r'(\w+)=~?"([^"]*)"', inside))


def metric_of(name: str) -> Metric | None:
    """The metric of the table that has this name in Prometheus."""
    whole = re.sub("_(bucket|sum|count)$", "", name)
    if whole != name and EXPORTED.get(whole, EXPORTED["ray_gptray_step"]).kind == "histogram":
        name = whole
    return EXPORTED.get(name)


def faults(expression: str) -> list[str]:
    """What an expression asks for and no job exports."""
    found = list(selectors(expression))
    unknown = [name for name, _ in found if not metric_of(name)]
    labels = {label for _, matchers in found for label in matchers}
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
    labels |= {label.strip() for group in grouped for label in group.split(",")}
    known = {
        "run",
        "le",
        *(tag for name, _ in found if (one := metric_of(name)) for tag in one.tags),
    }
    return unknown + sorted(labels - known) + ([] if found else [expression])


@pytest.mark.parametrize("expression", expressions(BOARD))
def test_every_panel_asks_for_what_jobs_export(expression: str) -> None:
    assert faults(expression) == []


def test_every_exported_metric_is_on_a_panel() -> None:
    drawn = {
        metric_of(name) for expression in expressions(BOARD) for name, _ in selectors(expression)
    }
    assert drawn == set(METRICS.values())


@pytest.mark.parametrize(
    "expression",
    [
        "ray_gptray_losss",
        "ray_gptray_train_steps",  # a counter has _total
        "ray_gptray_val_loss_total",
        "ray_gptray_step_bucket",
        "max by (name) (ray_gptray_step)",
        'ray_gptray_tokens_per_sec{task="train"}',
        "up",
    ],
)
def test_a_fault_is_seen(expression: str) -> None:
    assert faults(expression)


def test_values_of_labels_are_ones_that_jobs_give() -> None:
    given = {
        "part": set(PARTS),
        "state": {*STATES, "done", "failed", "all"},
        "job": {"train", "evaluate", "generate"},
        "run": {"$run"},
    }
    for expression in expressions(BOARD):
        for _, matchers in selectors(expression):
            for label, value in matchers.items():
                assert set(value.split("|")) <= given[label], expression


def test_panels_are_whole_and_none_lies_on_another() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(BOARD))) == names
