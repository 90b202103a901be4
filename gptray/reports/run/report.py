"""`report.html`: the results of a run or an evaluation, in one self-contained file.

Reads only the run folder, so it can be written at any time and by any job. `diagnosis` judges what
the numbers mean; `story` and `findings` put it into words and tables.
"""

from __future__ import annotations

from pathlib import Path

from gptray.config import UserError, load_config
from gptray.evaluation.model_commands import home_of, model_commands
from gptray.evaluation.result import Evaluation, load_evaluation
from gptray.reports.chart import run_charts
from gptray.reports.curves import curves_figure
from gptray.reports.page import save_png, write_page
from gptray.reports.run.diagnosis import diagnose
from gptray.reports.run.findings import evaluation_view, is_stale
from gptray.reports.run.story import RunRecord, run_state, run_view
from gptray.storage.record import read_events, read_metrics

STALE = "The run has found a better model since this evaluation: {} evaluates that one."


def write_report(folder: Path, *, running: bool = False) -> Path:
    """Write `report.html` of a run folder or of a folder with an evaluation; return its path.

    It covers whichever of `metrics.jsonl`, `events.jsonl`, `config.yaml` and `evaluation.json`
    exist. While `running`, the page says so and reloads itself in the browser; otherwise PNG files
    of its charts are written next to it. Each file is replaced atomically. Raises UserError for a
    folder with neither a run nor an evaluation.
    """
    evaluation = load_evaluation(folder)
    run = _read_run(folder, evaluation)
    if run is None and evaluation is None:
        raise UserError(f"{folder} has neither a run (config.yaml) nor an evaluation.json")
    charts = run_charts(run.rows, run.diagnosis) if run else []
    figures = [curves_figure(chart) for chart in charts]
    path = write_page(
        "run.html.j2",
        folder,
        running=running,
        run=run_view(run) | {"state": run_state(run, running=running)} if run else None,
        evaluation=_evaluation_view(folder, run, evaluation) if evaluation else None,
        figures=figures,
    )
    if not running:
        for figure in figures:
            save_png(figure, folder)
    return path


def _evaluation_view(
    folder: Path, run: RunRecord | None, evaluation: Evaluation
) -> dict[str, object]:
    stale = ""
    if run is not None and run.evaluation is None:
        stale = STALE.format(model_commands(folder, home_of(run.config))["evaluate"])
    return evaluation_view(evaluation) | {"stale": stale}


def _read_run(folder: Path, evaluation: Evaluation | None) -> RunRecord | None:
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        return None
    config = load_config(str(config_file), [])
    rows, events = read_metrics(folder), read_events(folder)
    current = None if evaluation and is_stale(evaluation, events) else evaluation
    return RunRecord(folder, config, rows, events, diagnose(rows, config, events), current)
