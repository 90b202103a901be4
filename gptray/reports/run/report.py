"""`report.html`: what a run or an evaluation has come to, in one file that needs no network.

Reads the run folder and nothing else, so it can be written at any time and by any job. What the
numbers mean is judged in `diagnosis`; the sections are `story`'s and `findings`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptray.config import UserError, load_config
from gptray.evaluation.commands import model_commands
from gptray.evaluation.result import Evaluation, load_evaluation
from gptray.files import replacing
from gptray.record import EVENTS, METRICS, read_rows
from gptray.reports.chart import Chart, run_charts
from gptray.reports.page import esc, footer, page, paragraph
from gptray.reports.png import save_pngs
from gptray.reports.run.diagnosis import diagnose
from gptray.reports.run.findings import evaluation_sections, evaluation_sentence
from gptray.reports.run.gap import is_stale
from gptray.reports.run.story import RunRecord, headline, run_sections, state_line

REPORT = "report.html"
# How often a browser reloads the page of a running run.
REFRESH_S = 10
STALE = "The run has found a better model since this evaluation: {} evaluates that one."


def write_report(folder: Path, *, running: bool = False) -> Path:
    """Write `report.html` of a run folder or of a folder with an evaluation; return its path.

    It covers `metrics.jsonl`, `events.jsonl`, `config.yaml` and `evaluation.json`, those that are
    there. While `running`, the page says so and renews itself in the browser; otherwise PNG files
    of its charts are written beside it. Each file appears whole.

    Raises:
        UserError: the folder has neither a run nor an evaluation.
    """
    evaluation = load_evaluation(folder)
    run = _read_run(folder, evaluation)
    if run is None and evaluation is None:
        raise UserError(f"{folder} has neither a run (config.yaml) nor an evaluation.json")
    charts = run_charts(run.rows, run.diagnosis) if run else []
    path = folder / REPORT
    with replacing(path) as draft:
        draft.write_text(_page(folder, run, evaluation, charts, running=running), "utf-8")
    if not running:
        save_pngs(charts, folder)
    return path


def _read_run(folder: Path, evaluation: Evaluation | None) -> RunRecord | None:
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        return None
    config = load_config(str(config_file), [])
    rows, events = read_rows(folder / METRICS), read_rows(folder / EVENTS)
    current = None if evaluation and is_stale(evaluation, events) else evaluation
    return RunRecord(folder, config, rows, events, diagnose(rows, config, events), current)


def _page(
    folder: Path,
    run: RunRecord | None,
    evaluation: Evaluation | None,
    charts: Sequence[Chart],
    *,
    running: bool,
) -> str:
    name = folder.resolve().name
    parts = [f"<header><h1>{esc(name)}</h1>"]
    if run:
        parts += [state_line(run, running=running), headline(run)]
    elif evaluation:
        parts.append(paragraph(evaluation_sentence(evaluation), "headline"))
    parts.append("</header>")
    if run:
        found = evaluation_sections(evaluation) if evaluation else []
        if evaluation and not run.evaluation:
            found.insert(0, paragraph(STALE.format(model_commands(folder)["evaluate"]), "soft"))
        parts += run_sections(run, charts, found)
    elif evaluation:
        parts += evaluation_sections(evaluation)
    parts.append(footer())
    return page(name, "\n".join(parts), refresh_s=REFRESH_S if running else None)
