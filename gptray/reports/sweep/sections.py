"""The sections of a sweep's report: tables of trials, steps and effects, and how each came."""

from __future__ import annotations

from statistics import stdev

from gptray.config import dump
from gptray.data.difference import percent
from gptray.reports.page import Row, details, esc, paragraph, table, tiles
from gptray.reports.sweep.dots import effects_figure, panels
from gptray.reports.sweep.pictures import steps_bar
from gptray.reports.sweep.story import findings, too_few
from gptray.tuning.effects import ENOUGH_GONE_ON, Interval, gap_bits
from gptray.tuning.levels import assignment
from gptray.tuning.plan import mean_score, score
from gptray.tuning.ranking import Standing, is_wrong
from gptray.tuning.record import Trial
from gptray.wording import count

# Trials of the ranking that are shown at once.
SHOWN = 20

SPARED_BY = {
    "stopped": ("spared", "saved by stopping at rungs"),
    "patience": ("early", "saved by early stopping"),
    "wrong": ("wrong", "not run by trials that went wrong"),
    "open": ("single", "still to be run"),
}
METHOD = (
    "Trials are compared at equal steps: at each rung and at the end by their lowest validation "
    "loss so far, and by the gap of the last evaluation (validation loss - training loss, in bits "
    "per byte; dropout is on in training loss). At the first rung a trial's loss is taken as a sum "
    "of one part for each of its settings and a rest. At each later one, from the trials that went "
    "on, it is that sum again with something added for each setting, plus a share of the trial's "
    "own rest at the rung before. As a trial is stopped for its loss at a rung and nothing "
    "else, this makes up for the stopped ones. All parts are estimated together by a Bayesian "
    "regression (group horseshoe prior, Student's t errors, Gibbs sampling), which takes a setting "
    "to do nothing until trials say otherwise. A level is compared with that of the config as it "
    "is, or with the most frequent one where few trials have that. The dot is the median of the "
    "draws, the line holds 95 % of them."
)
LIMITS = (
    "Limits: parts add up, so what two settings do only together is not seen and makes intervals "
    "too narrow. The more trials were stopped before a step, the more its numbers rest on the few "
    "that went on; a level is compared at the last step to which "
    f"{ENOUGH_GONE_ON} trials of it and of its counterpart came, and an early step says little "
    "of what pays late. Small effects are drawn towards zero. With some twenty levels, one "
    "interval may miss the truth by chance. Trials that diverged or failed and repetitions are "
    "left out."
)


def figures(standing: Standing) -> str:
    """The numbers at a glance."""
    best, own = standing.best, standing.own
    if best is None or best.best is None:
        return ""
    at = f"lowest validation bits per byte: trial {best.name}, step {best.best['step']:,}"
    found = [(f"{score(best):.3f}", at)]
    if own and own.name != best.name:
        found.append((f"{score(own) - score(best):.3f}", "lower than the config as it is"))
    found.append(
        (f"{gap_bits(best.best):+.3f}", "validation minus training loss there, bits per byte")
    )
    if standing.steps_full:
        share = 100 * standing.steps_run / standing.steps_full
        found.append((f"{share:.0f} %", "of the steps of all trials were run"))
    return tiles(found)


def steps(standing: Standing) -> str:
    """Steps run against steps saved, as a bar and in numbers."""
    if not standing.steps_full:
        return ""
    spared = standing.spared()
    shares = [("run", "run", standing.steps_run)]
    shares += [(*SPARED_BY[kind], number) for kind, number in spared.items()]
    how = (
        f"{count(standing.steps_full, 'step')} would be all trials and repetitions run to their "
        "ends (the sum of their train.max_steps)."
    )
    return steps_bar(shares) + paragraph(how, "soft")


def worth(standing: Standing) -> list[str]:
    """What each level of each setting did to loss and gap, or why that cannot be said."""
    lacking = too_few(standing)
    if lacking:
        return [paragraph(lacking)]
    effects = standing.effects
    reached = ", ".join(
        f"{number:,} at step {step:,}"
        for step, number in zip(effects.steps, effects.reached, strict=True)
    )
    hollow = ""
    if any(effect.last != effect.first for effect in effects.of):
        hollow = f"Hollow dots: the same at step {effects.steps[0]:,}. "
    return [
        findings(standing),
        effects_figure(effects.of),
        paragraph(f"{hollow}Trials compared: {reached}.", "soft"),
        details("these numbers", _effects_table(standing), on_paper=True),
        details("how they were computed", paragraph(METHOD) + paragraph(LIMITS), on_paper=True),
    ]


def _effects_table(standing: Standing) -> str:
    rows = []
    for effect in standing.effects.of:
        setting = effect.setting
        level, other = setting.levels[effect.level], setting.levels[setting.reference]
        how = (
            f"{level} instead of {other}; {count(effect.trials, 'trial')} against {effect.against}"
        )
        if effect.last is None:
            rows.append(Row(setting.name, f"{how}: not enough trials", ("", "", "")))
            continue
        worth = effect.last
        values = (f"{worth.step:,}", _interval(worth.loss), _interval(worth.gap))
        rows.append(Row(setting.name, how, values))
    return table(["at step", "loss", "gap"], rows)


def _interval(found: Interval) -> str:
    return f"{found.middle:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def ranking(standing: Standing) -> list[str]:
    """All trials with what they came to and their settings."""
    rows = [
        _trial_row(number, trial, standing) for number, trial in enumerate(standing.trials, start=1)
    ]
    if not rows:
        return []
    columns = ["bits per byte", "at step", "gap there", "steps run"]
    how = (
        "Bits per byte: lowest validation loss x tokens / (ln 2 x bytes of text), the same text "
        "for all. Gap: validation loss - training loss of that evaluation, in bits per byte."
    )
    if any(trial.lost for trial in standing.trials):
        how += " Each byte that a tokenizer loses is charged 8 bits."
    parts = [paragraph(how, "soft"), table(columns, rows[:SHOWN])]
    if len(rows) > SHOWN:
        rest = table(columns, rows[SHOWN:])
        parts.append(details(f"the other {len(rows) - SHOWN:,}", rest, on_paper=True))
    return parts


def _trial_row(number: int, trial: Trial, standing: Standing) -> Row:
    best = trial.best
    values = ", ".join(
        assignment(setting, trial.name)
        for setting in standing.settings
        if trial.name in setting.values
    )
    lost = f"its tokenizer loses {percent(trial.lost)} of the text" if trial.lost else ""
    notes = [note for note in (_note(trial, standing), trial.message or "", lost, values) if note]
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


def _note(trial: Trial, standing: Standing) -> str:
    notes = []
    if standing.best and trial.name == standing.best.name:
        notes.append("the winner" if standing.sweep.winner else "ahead")
    if standing.own and trial.name == standing.own.name:
        notes.append("the config as it is")
    ended = {"patience": "stopped early", "stopped": "stopped at a rung"}
    waiting = "runs" if trial.started else "waits"
    notes.append(ended.get(trial.outcome, trial.outcome) if trial.outcome else waiting)
    return ", ".join(notes)


def by_setting(standing: Standing) -> list[str]:
    """The small pictures and what their dots are."""
    drawn = panels(standing)
    if not drawn:
        return []
    how = (
        "Lowest validation loss in bits per byte, a dot for each trial: hollow where it was "
        "stopped at a rung, large green the best one, large orange the config as it is."
    )
    return [paragraph(how, "soft"), drawn]


def repetitions(standing: Standing) -> str:
    """Of each trial that was repeated: its scores, their mean and their spread."""
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
    return table(["mean", "standard deviation", "seeds"], rows)


def went_wrong(standing: Standing) -> str:
    """Trials that diverged or failed, with what they said."""
    lines = [
        f"<li><b>{esc(trial.name)}</b> {esc(trial.outcome)} at step {trial.step:,}: "
        f"{esc(trial.message or 'no message')}</li>"
        for trial in standing.sweep.trials
        if is_wrong(trial)
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def the_config(standing: Standing) -> str:
    """The sweep's whole config, folded."""
    text = esc(dump(standing.sweep.config))
    return details("the whole config", f"<pre>{text}</pre>", on_paper=True)
