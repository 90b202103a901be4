"""The samples from training that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.record import Event
from gptray.reports.run.diagnosis import Diagnosis
from gptray.wording import count

# How many evaluations' samples are shown at once, and how many more unfold.
SHOWN, FOLDED = 5, 40


@dataclass(frozen=True)
class Written:
    """What the model wrote at one step: (prompt, continuation) pairs."""

    title: str
    texts: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Samples:
    """The samples that are shown at once, and those that a click unfolds."""

    shown: Sequence[Written]
    folded: Sequence[Written]

    @property
    def folded_title(self) -> str:
        return f"{count(len(self.folded), 'evaluation')} between these"


def samples_of(events: Sequence[Event], diagnosis: Diagnosis) -> Samples:
    """The samples to show, from the first evaluation to the last."""
    landed = diagnosis.landed.points if diagnosis.landed else ()
    evaluated = {point.step for point in (*diagnosis.points, *landed)}
    # A run resumed from an earlier checkpoint has sampled some steps twice; the later one counts.
    written = {
        event["step"]: event["samples"]
        for event in events
        if event["event"] == "evaluated" and event["step"] in evaluated and event["samples"]
    }
    best = diagnosis.chosen.step if diagnosis.chosen else None
    steps = sorted(written)
    shown = _spread(steps, SHOWN, best)
    folded = _spread([step for step in steps if step not in shown], FOLDED, None)

    def of(step: int) -> Written:
        title = f"Step {step:,}" + (", the best" if step == best else "")
        return Written(title, written[step])

    return Samples([of(step) for step in shown], [of(step) for step in folded])


def _spread(steps: Sequence[int], most: int, wanted: int | None) -> list[int]:
    """At most `most` of the steps, evenly spaced, including the ends and `wanted`."""
    if len(steps) <= most:
        return list(steps)
    chosen = {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)}
    if wanted is not None and wanted in steps and wanted not in chosen:
        chosen.remove(min(sorted(chosen)[1:-1], key=lambda step: abs(step - wanted)))
        chosen.add(wanted)
    return sorted(chosen)
