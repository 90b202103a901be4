"""A sweep's `report.html`: which trial won, by which settings and at what cost, in one file.

Reads only the sweep's folder, so it can be written at any time. It is built from the same pieces as
a run's report.
"""

from __future__ import annotations

from pathlib import Path
from statistics import stdev

from gptray.config import UserError, dump
from gptray.data.difference import percent
from gptray.reports.curves import curves_figure
from gptray.reports.page import Row, Table, save_png, write_page
from gptray.reports.picture import Figure
from gptray.reports.sweep.headline import (
    as_it_is,
    compared_levels,
    findings,
    headline,
    losses_line,
    sweep_state,
    too_few,
)
from gptray.reports.sweep.learning import learning_charts, settings_words
from gptray.reports.sweep.more_text import text_figure, text_lines
from gptray.reports.sweep.panels import panel_figures
from gptray.reports.sweep.worth import effects_figure
from gptray.tuning.effects import ENOUGH_GONE_ON, Interval, gap_bits
from gptray.tuning.more_trials import StoppedEarly
from gptray.tuning.ranking import Ranking, is_wrong
from gptray.tuning.sweep_record import TRIALS, Trial, load_sweep, trial_changes
from gptray.tuning.text_shares import TextShares
from gptray.tuning.trial_plan import mean_score, score
from gptray.tuning.winner_commands import winner_commands
from gptray.wording import count

# How many ranked trials are shown without a click.
SHOWN = 20
TRIAL_COLUMNS = ("bits per byte", "at step", "gap there", "steps run")

SPARED_BY = {
    "stopped": ("spared", "saved by stopping at rungs"),
    "patience": ("early", "saved by early stopping"),
    "wrong": ("wrong", "not run because trials went wrong"),
    "open": ("single", "still to be run"),
}


def write_sweep_report(folder: Path, *, running: bool = False) -> Path:
    """Write a sweep's `report.html`; return its path.

    While `running`, the page says so and reloads itself in the browser; otherwise PNG files of its
    curves and effects are written next to it. Each file is replaced atomically. Raises UserError
    for a folder without a sweep.
    """
    if not (folder / TRIALS).is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no sweep (config.yaml and {TRIALS})")
    standing = Ranking(load_sweep(folder))
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


def sweep_view(standing: Ranking, effects: Figure | None) -> dict[str, object]:
    """The fields of `sweep.html.j2`."""
    rows = [
        _trial_row(number, trial, standing) for number, trial in enumerate(standing.trials, start=1)
    ]
    lacking = too_few(standing)
    stopped = StoppedEarly.of_sweep(standing.sweep.folder)
    worth = {} if lacking else _worth(standing) | {"effects": effects}
    return worth | {
        "headline": headline(standing),
        "losses": losses_line(standing),
        "stopped_early": stopped.words if stopped else "",
        "tiles": _tiles(standing),
        "commands": winner_commands(standing.sweep),
        "steps_full": count(standing.steps_full, "step") if standing.steps_full else "",
        "shares": _shares(standing),
        "too_few": lacking,
        "panels": panel_figures(standing),
        "trials": Table(TRIAL_COLUMNS, rows[:SHOWN]),
        "other_trials": Table(TRIAL_COLUMNS, rows[SHOWN:]),
        "any_lost": any(trial.lost for trial in standing.trials),
        "repetitions": _repetitions(standing),
        "wrong": [trial for trial in standing.sweep.trials if is_wrong(trial)],
        "whole_config": dump(standing.sweep.config),
    }


def _tiles(standing: Ranking) -> list[tuple[str, str]]:
    best, own = standing.best, standing.own
    if best is None or best.best is None:
        return []
    at = f"lowest validation bits per byte: trial {best.name}, step {best.best['step']:,}"
    found = [(f"{score(best):.3f}", at)]
    if own and own.name != best.name:
        found.append((f"{score(own) - score(best):.3f}", f"lower than {as_it_is(own)}"))
    found.append(
        (f"{gap_bits(best.best):+.3f}", "validation minus training loss there, bits per byte")
    )
    if standing.steps_full:
        share = 100 * standing.steps_run / standing.steps_full
        found.append((f"{share:.0f}%", "of the steps of all trials were run"))
    return found


def _shares(standing: Ranking) -> list[tuple[str, str, int]]:
    """Steps run and steps saved: class, name and number of each non-empty part."""
    spared = [(*SPARED_BY[kind], number) for kind, number in standing.spared().items()]
    return [share for share in (("run", "run", standing.steps_run), *spared) if share[2]]


def _worth(standing: Ranking) -> dict[str, object]:
    """The effect of each level of each setting on loss and gap."""
    effects = standing.effects
    reached = ", ".join(
        f"{number:,} at step {step:,}"
        for step, number in zip(effects.steps, effects.reached, strict=True)
    )
    hollow = ""
    if any(effect.last != effect.first for effect in effects.of):
        hollow = f"Hollow dots: the same at step {effects.steps[0]:,}. "
    return {
        "findings": findings(standing),
        "compared": f"{hollow}Trials compared: {reached}.",
        "effects_table": _effects_table(standing),
        "enough_gone_on": ENOUGH_GONE_ON,
    }


def _effects_table(standing: Ranking) -> Table:
    rows = []
    for effect in standing.effects.of:
        setting = effect.setting
        trials = f"{count(effect.trials, 'trial')} against {effect.against}"
        how = f"{compared_levels(effect)}; {trials}"
        if effect.last is None:
            rows.append(Row(setting.name, f"{how}: not enough trials", ("", "", "")))
            continue
        worth = effect.last
        values = (f"{worth.step:,}", _interval(worth.loss), _interval(worth.gap))
        rows.append(Row(setting.name, how, values))
    return Table(["at step", "loss", "gap"], rows)


def _interval(found: Interval) -> str:
    return f"{found.middle:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _trial_row(number: int, trial: Trial, standing: Ranking) -> Row:
    best = trial.best
    lost = f"its tokenizer loses {percent(trial.lost)} of the text" if trial.lost else ""
    also = "; ".join(one.words for one in trial_changes(standing.sweep.folder, trial) if one.name)
    values = settings_words(trial, standing)
    parts = (_note(trial, standing), trial.message or "", lost, values, also)
    notes = [note for note in parts if note]
    numbers = ("-", "-", "-")
    if best:
        numbers = (f"{best['val_bpb']:.4f}", f"{best['step']:,}", f"{gap_bits(best):+.3f}")
    rank = f"{number}.\u00a0" if best and not is_wrong(trial) else ""
    return Row(
        f"{rank}{trial.name}",
        "; ".join(notes),
        (*numbers, f"{trial.step:,}"),
        is_best=standing.best is not None and trial.name == standing.best.name,
    )


def _note(trial: Trial, standing: Ranking) -> str:
    notes = []
    if standing.best and trial.name == standing.best.name:
        notes.append("the winner" if standing.sweep.winner else "ahead")
    if standing.own and trial.name == standing.own.name:
        notes.append("the config as it is")
    ended = {"patience": "stopped early", "stopped": "stopped at a rung"}
    waiting = "runs" if trial.started else "waits"
    notes.append(ended.get(trial.outcome, trial.outcome) if trial.outcome else waiting)
    return ", ".join(notes)


def _repetitions(standing: Ranking) -> Table:
    """The scores of each repeated trial, with mean and standard deviation."""
    names = list(dict.fromkeys(one.replicate_of for one in standing.repetitions))
    rows = []
    for trial in standing.trials:
        if trial.name not in names:
            continue
        over = [one for one in standing.repetitions if one.outcome]
        others = [one for one in over if one.replicate_of == trial.name]
        scores = [score(one) for one in (trial, *others) if one.best and not is_wrong(one)]
        listed = ", ".join(f"{one:.4f}" for one in scores)
        wrong = sum(is_wrong(one) for one in others)
        how = f"bits per byte: {listed}" + (f"; {wrong} went wrong" if wrong else "")
        spread = f"{stdev(scores):.4f}" if len(scores) > 1 else "-"
        mean = f"{mean_score(trial, (trial, *others)):.4f}"
        rows.append(Row(f"trial {trial.name}", how, (mean, spread, f"{len(scores)}")))
    return Table(["mean", "standard deviation", "seeds"], rows)
