"""A sweep's results in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gptray.tuning import levels
from gptray.tuning.effects import ENOUGH, Effect
from gptray.tuning.levels import assignment
from gptray.tuning.ranking import Ranking, is_wrong
from gptray.tuning.seen import Seen
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import loses_text, lossy_ahead, mean_score, score
from gptray.wording import count, decimals

# The most settings that a sentence names.
NAMED = 4
# Settings that raise only training loss, and so narrow the gap whatever is learnt.
NOISE = {"model.dropout", "lora.dropout", "data.token_replacement"}
CHANGED: tuple[tuple[Literal["loss", "gap"], bool, str], ...] = (
    ("loss", True, "Lowered validation loss"),
    ("loss", False, "Raised validation loss"),
    ("gap", True, "Narrowed the gap to training loss"),
    ("gap", False, "Widened the gap to training loss"),
)


def sweep_state(standing: Ranking, *, running: bool) -> tuple[str, str]:
    """The sweep's state: a word, and the rest of the line."""
    trials = standing.sweep.trials
    ended = sum(trial.outcome is not None for trial in trials)
    run = sum(trial.started and trial.outcome is None for trial in trials)
    first = sum(not trial.replicate_of for trial in trials)
    of_all = f": {ended} of {count(_total(standing), 'trial')} ended"
    if running:
        return "running", of_all + (f", {run} running" if run else "")
    if standing.sweep.winner:
        repeated = f" and {count(len(trials) - first, 'repetition')}" if first < len(trials) else ""
        return "finished", f" after {count(first, 'trial')}{repeated}"
    if trials and ended == len(trials) and standing.best is None:
        return "failed", f": none of {count(ended, 'trial')} produced a model"
    return "interrupted", f"{of_all}; the same command resumes it"


def headline(standing: Ranking) -> str:
    """Which trial generalises best, compared with the unchanged config, and at what cost."""
    best = standing.best
    if best is None:
        over = any(trial.outcome for trial in standing.sweep.trials)
        return "No trial produced a model." if over else "No trial has been evaluated yet."
    saw = f"Its model has seen {Seen(best, standing.sweep.config).words}."
    parts = _who(standing, best), saw, _why(standing, best), _cost(standing)
    return " ".join(filter(None, parts))


def losses_line(standing: Ranking) -> str:
    """Which of the leading trials have a tokenizer that loses text; "" if none has."""
    ahead = lossy_ahead(standing.trials, standing.best) if standing.best else []
    if not ahead:
        return ""
    text = "; ".join(map(loses_text, ahead[:NAMED]))
    more = f"; and {len(ahead) - NAMED} more" if len(ahead) > NAMED else ""
    return f"{text[0].upper()}{text[1:]}{more}. In scores, each lost byte counts 8 bits."


def findings(standing: Ranking) -> list[tuple[str, str]]:
    """What changed loss and gap, and what is unclear: each sentence's beginning and rest."""
    lines = []
    for outcome, lower, word in CHANGED:
        clear = []
        for effect, worth in standing.clear_effects(outcome, lower=lower):
            if outcome == "gap" and is_noise(effect):
                continue
            change = f"{worth.middle:+.{decimals(worth.middle)}f}"
            clear.append(f"{effect.setting.name} {compared_levels(effect)} ({change})")
        if clear:
            lines.append((f"{word}:", f" {'; '.join(clear)}."))
    compared = [effect.last for effect in standing.effects.of if effect.last]
    unclear = sum(not (worth.loss.excludes_zero or worth.gap.excludes_zero) for worth in compared)
    if unclear:
        rest = count(unclear, "other level" if unclear < len(compared) else "level")
        lines.append(("No clear effect:", f" {rest}."))
    compared_noise = [one for one in standing.effects.of if one.last and is_noise(one)]
    if names := ", ".join(dict.fromkeys(one.setting.name for one in compared_noise)):
        lines.append(("The gap says nothing", f" about {names}: such noise raises training loss."))
    few = [effect for effect in standing.effects.of if not effect.last]
    if few:
        lines.append(("Not enough trials", f" to say anything about: {_names(few)}."))
    return lines


def is_noise(effect: Effect) -> bool:
    """Whether an effect's setting changes what training loss measures."""
    return not NOISE.isdisjoint(effect.setting.entry.paths)


def too_few(standing: Ranking) -> str:
    """Why nothing can be said about any setting; "" if something can."""
    compared = standing.effects.reached[0]
    if compared < ENOUGH:
        step = standing.effects.steps[0]
        return (
            f"Not enough trials: {count(compared, 'trial')} got to step {step:,}, where they are "
            f"first compared; it takes {ENOUGH}."
        )
    if not any(effect.last for effect in standing.effects.of):
        return (
            "Not enough trials: no two levels of a setting have "
            f"{levels.ENOUGH} trials each to compare."
        )
    return ""


def compared_levels(effect: Effect) -> str:
    """The compared levels, such as "0.2 to 0.3 instead of 0 to 0.1"."""
    levels = effect.setting.levels
    return f"{levels[effect.level]} instead of {levels[effect.setting.reference]}"


def _who(standing: Ranking, best: Trial) -> str:
    ahead = "generalises best" if standing.sweep.winner else "is ahead"
    own = standing.own
    text = f"Trial {best.name} {ahead}: {bits(best, standing)}"
    if own is None:
        return f"{text}."
    if own.name == best.name:
        return f"The config as it is (trial {own.name}) {ahead}: {bits(best, standing)}."
    return f"{text}, against {score(own):.3f} of {as_it_is(own)}."


def as_it_is(own: Trial) -> str:
    """Words for the unchanged config's trial, with its last step if a rung stopped it."""
    stopped = f" when it was stopped at step {own.step:,}" if own.outcome == "stopped" else ""
    return f"the config as it is{stopped}"


def bits(trial: Trial, standing: Ranking) -> str:
    """A trial's validation loss in words, averaged over its repetitions if it has any."""
    over = [one for one in standing.sweep.trials if one.outcome]
    repeated = sum(one.replicate_of == trial.name and not is_wrong(one) for one in over)
    if repeated:
        mean = mean_score(trial, over)
        return f"{mean:.3f} validation bits per byte on average over {repeated + 1} seeds"
    return f"{score(trial):.3f} validation bits per byte"


def _why(standing: Ranking, best: Trial) -> str:
    """The best trial's settings that helped or, if none is known to, those that differ."""
    changes = standing.changes(best)
    clear = {
        effect.setting.name
        for effect, _ in standing.clear_effects("loss", lower=True)
        if effect.setting.of.get(best.name) == effect.level
    }
    helped = [setting for setting in changes if setting.name in clear]
    named = helped or changes
    shown = [assignment(setting, best.name) for setting in named[:NAMED]]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    lead = "What helped it" if helped else "Its settings"
    return f"{lead}: {', '.join(shown)}{more}." if shown else ""


def _cost(standing: Ranking) -> str:
    run, full = standing.steps_run, standing.steps_full
    if not full:
        return ""
    if not standing.sweep.winner:
        return f"So far it took {count(run, 'step')}."
    return (
        f"The sweep took {100 * run / full:.0f}% of the steps that all trials would take in "
        f"full: {run:,} of {full:,}."
    )


def _names(effects: Sequence[Effect]) -> str:
    levels: dict[str, list[str]] = {}
    for effect in effects:
        levels.setdefault(effect.setting.name, []).append(effect.setting.levels[effect.level])
    return "; ".join(f"{name} {', '.join(found)}" for name, found in levels.items())


def _total(standing: Ranking) -> int:
    """The number of trials that are planned or still to be suggested."""
    tune, planned = standing.sweep.config.tune, len(standing.sweep.trials)
    if tune.search_alg == "random":
        return planned
    return max(planned, tune.num_samples + tune.baseline)
