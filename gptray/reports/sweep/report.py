"""`report.html` of a sweep: who won, by which settings, and what that cost, in one file.

Reads the sweep's folder and nothing else, so it can be written at any time. It is of the same
house as a run's report, from whose pieces it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptray.config import UserError
from gptray.files import replacing
from gptray.reports.chart import Chart
from gptray.reports.page import esc, footer, page, section
from gptray.reports.png import save_pngs
from gptray.reports.run.report import REFRESH_S, REPORT
from gptray.reports.svg import figure
from gptray.reports.sweep.pictures import curves_chart
from gptray.reports.sweep.png import save_effects
from gptray.reports.sweep.sections import (
    by_setting,
    figures,
    ranking,
    repetitions,
    steps,
    the_config,
    went_wrong,
    worth,
)
from gptray.reports.sweep.story import headline, state_line
from gptray.tuning.ranking import Standing
from gptray.tuning.record import TRIALS, load_sweep


def write_sweep_report(folder: Path, *, running: bool = False) -> Path:
    """Write `report.html` of a sweep's folder; return its path.

    While `running`, the page says so and renews itself in the browser; otherwise PNG files of its
    curves and effects are written beside it. Each file appears whole.

    Raises:
        UserError: the folder has no sweep.
    """
    if not (folder / TRIALS).is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no sweep (config.yaml and {TRIALS})")
    standing = Standing.of(load_sweep(folder))
    charts = curves_chart(standing)
    path = folder / REPORT
    with replacing(path) as draft:
        draft.write_text(_page(folder, standing, charts, running=running), "utf-8")
    if not running:
        save_pngs(charts, folder)
        save_effects(standing.effects.of, folder)
    return path


def _page(folder: Path, standing: Standing, charts: Sequence[Chart], *, running: bool) -> str:
    name = folder.resolve().name
    parts = [
        f"<header><h1>{esc(name)}</h1>",
        state_line(standing, running=running),
        headline(standing),
        "</header>",
        figures(standing),
        section("Learning curves", *map(figure, charts)),
        section("Steps run and steps saved", steps(standing)),
        section("What each setting was worth", *worth(standing)),
        section("Trials by each setting", *by_setting(standing)),
        section("Trials, the best first", *ranking(standing)),
        section("Repetitions with other seeds", repetitions(standing)),
        section("What went wrong", went_wrong(standing)),
        section("Config", the_config(standing)),
        footer(),
    ]
    body = "\n".join(part for part in parts if part)
    return page(name, body, refresh_s=REFRESH_S if running else None)
