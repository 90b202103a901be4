"""The samples from training that a report shows."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.reports.run.diagnosis import Diagnosis
from gptray.storage.record import Event
from gptray.wording import count

# How many evaluations' samples are shown at once, and how many more unfold.
SHOWN, FOLDED = 5, 40


def samples_of(events: Sequence[Event], diagnosis: Diagnosis) -> dict[str, object]:
    """The samples from the first evaluation to the last, for `run.html.j2`.

    shown at once, and folded, which a click unfolds: for each step its title, and the (prompt,
    continuation) pairs.
    """
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

    def of(step: int) -> tuple[str, Sequence[Sequence[str]]]:
        return f"Step {step:,}" + ", the best" * (step == best), written[step]

    return {
        "shown": list(map(of, shown)),
        "folded": list(map(of, folded)),
        "folded_title": f"{count(len(folded), 'evaluation')} between these",
    }


def _spread(steps: Sequence[int], most: int, wanted: int | None) -> list[int]:
    """At most `most` of the steps, evenly spaced, including the ends and `wanted`."""
    if len(steps) <= most:
        return list(steps)
    chosen = {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)}
    if wanted is not None and wanted in steps and wanted not in chosen:
        chosen.remove(min(sorted(chosen)[1:-1], key=lambda step: abs(step - wanted)))
        chosen.add(wanted)
    return sorted(chosen)
