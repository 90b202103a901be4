"""`report.html` of a sweep: who won, by which settings, and what that cost, in one file.

Reads the sweep's folder and nothing else, so it can be written at any time. It is built from the
same pieces as a run's report.
"""

from __future__ import annotations

from pathlib import Path

from gptray.config import UserError
from gptray.reports.curves import curves_figure
from gptray.reports.page import write_page
from gptray.reports.png import save_png
from gptray.reports.sweep.headline import sweep_state
from gptray.reports.sweep.learning import learning_charts
from gptray.reports.sweep.more_text import text_figure, text_lines
from gptray.reports.sweep.sections import sweep_view
from gptray.reports.sweep.worth import effects_figure
from gptray.tuning.ranking import Ranking
from gptray.tuning.sweep_record import TRIALS, load_sweep
from gptray.tuning.text_shares import TextShares


def write_sweep_report(folder: Path, *, running: bool = False) -> Path:
    """Write `report.html` of a sweep's folder; return its path.

    While `running`, the page says so and reloads itself in the browser; otherwise PNG files of its
    curves and effects are written next to it. Each file is replaced as a whole.

    Raises:
        UserError: the folder has no sweep.
    """
    if not (folder / TRIALS).is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no sweep (config.yaml and {TRIALS})")
    standing = Ranking.of(load_sweep(folder))
    curves = [curves_figure(chart) for chart in learning_charts(standing)]
    effects = effects_figure(standing.effects.of)
    shares = TextShares.of(standing.sweep)
    by_text = text_figure(shares) if shares else None
    path = write_page(
        "sweep.html.j2",
        folder,
        running=running,
        state=sweep_state(standing, running=running),
        curves=curves,
        text_lines=text_lines(shares) if shares else [],
        by_text=by_text,
        **sweep_view(standing, effects),
    )
    if not running:
        for figure in (*curves, effects, by_text):
            if figure:
                save_png(figure, folder)
    return path
