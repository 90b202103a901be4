"""A diagnosis in one or two plain sentences."""

from __future__ import annotations

from gptray.config import Config
from gptray.reports.run.advice import advise
from gptray.reports.run.diagnosis import Diagnosis
from gptray.wording import count, decimals, time_words

# How many pieces of advice the sentence includes.
IN_SENTENCE = 3


def sentence(diagnosis: Diagnosis, config: Config) -> str:
    """What happened and what to try, in one or two plain sentences."""
    told = _told(diagnosis) + _landing(diagnosis)
    if diagnosis.ended is None and diagnosis.verdict != "none":
        told = f"So far {told[0].lower()}{told[1:]}"
    advice = [item.change for item in advise(diagnosis, config)[:IN_SENTENCE]]
    if not advice:
        return told
    lead = "For a still lower one, try" if diagnosis.verdict == "level" else "Try"
    return f"{told} {lead}: {', '.join(advice)}."


def _told(diagnosis: Diagnosis) -> str:
    best, last = diagnosis.best, diagnosis.last
    if best is None or last is None:
        if diagnosis.verdict == "unstable":
            return f"Training stopped after step {diagnosis.last_step:,}: a number was not finite."
        return "There is no evaluation to judge from yet."
    places, time = decimals(diagnosis.worse or 1.0), _timed(diagnosis, diagnosis.steps_saved)
    at_best = f"Validation loss was best at step {best.step:,} ({best.val_loss:.{places}f})"
    saved = f"saved {count(diagnosis.steps_saved, 'step')}" + (f" ({time})" if time else "")
    worse = f"{diagnosis.worse:.{decimals(diagnosis.worse)}f}"
    match diagnosis.verdict:
        case "overfitting":
            return f"{at_best}; {_cost(diagnosis, worse, saved)}."
        case "unsure":
            after = sum(point.step > best.step for point in diagnosis.points)
            text = (
                f"{at_best} and {worse} higher {count(after, 'evaluation')} later: too few to "
                "tell a turn from noise"
            )
            return f"{text}; stopping there {saved}." if diagnosis.steps_saved else f"{text}."
        case "unstable" if diagnosis.ended == "non_finite":
            return (
                f"{at_best}; training stopped after step {diagnosis.last_step:,}, when a number "
                "was no longer finite."
            )
        case "unstable":
            return (
                f"{at_best}; since then training loss rose along with it, and it ended {worse} "
                "higher: training became unstable, which is not overfitting."
            )
        case "harmed":
            assert diagnosis.base is not None
            places = decimals(best.val_loss - diagnosis.base or 1.0)
            ends = "" if best == last else f" and {last.val_loss:.{places}f} at the end"
            return (
                f"The model was better before training ({diagnosis.base:.{places}f}): validation "
                f"loss was {best.val_loss:.{places}f} at best (step {best.step:,}){ends}."
            )
        case "stuck":
            stayed = f"validation loss stayed at {last.val_loss:.2f}"
            return f"The model has learned next to nothing: {stayed}."
        case "falling":
            how = "is still falling" if diagnosis.ended is None else "was still falling at the end"
            return f"Validation loss {how}: {last.val_loss:.2f} at step {last.step:,}."
        case "level":
            text = f"{at_best} and has hardly changed since: nothing is wrong"
            return f"{text}; early stopping {saved}." if diagnosis.steps_saved else f"{text}."
        case _:
            loss = f"{best.val_loss:.2f} at step {best.step:,}"
            return f"There is only one evaluation: validation loss {loss}."


def _landing(diagnosis: Diagnosis) -> str:
    """A sentence on the landing, with a leading space; "" without one."""
    landed = diagnosis.landed
    if landed is None:
        return ""
    change = f"{abs(landed.gain):.{decimals(landed.gain)}f}"
    loss = f"{landed.best.val_loss:.{decimals(landed.gain)}f}"
    if landed.gain > 0:
        return f" Landing from step {landed.back_to:,} took it to {loss}, {change} lower."
    return (
        f" Landing from step {landed.back_to:,} did not help: {loss}, {change} higher, so the "
        "model is from before it."
    )


def _timed(diagnosis: Diagnosis, steps: int) -> str:
    seconds = diagnosis.seconds(steps)
    return time_words(seconds) if seconds is not None else ""


def _cost(diagnosis: Diagnosis, worse: str, saved: str) -> str:
    """What the steps after the best one cost."""
    steps = diagnosis.steps_after_best
    if diagnosis.ended == "patience":
        return f"early stopping ended training {count(steps, 'step')} later and {saved}"
    after = f"the {count(steps, 'step')}" if steps > 1 else "the step"
    time = _timed(diagnosis, steps)
    return f"{after} after it {f'cost {time} and ' if time else ''}made it {worse} worse"
