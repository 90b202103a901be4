"""The report's section of samples from training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptray.reports.page import continuation, details, paragraph, section
from gptray.reports.run.diagnosis import Diagnosis
from gptray.wording import count

# Evaluations whose samples are shown at once, and those that a click unfolds.
SHOWN, FOLDED = 5, 40


def samples_section(events: Sequence[Mapping[str, Any]], diagnosis: Diagnosis) -> str:
    """What the model wrote, from its first evaluation to its last."""
    evaluated = {point.step for point in diagnosis.points}
    # A run resumed from an earlier checkpoint has sampled some steps twice: the later one counts.
    written = {
        event["step"]: event["samples"]
        for event in events
        if event["event"] == "evaluated" and event["step"] in evaluated and event["samples"]
    }
    if not written:
        return ""
    best = diagnosis.best.step if diagnosis.best else None
    steps = sorted(written)
    shown = _spread(steps, SHOWN, best)
    folded = _spread([step for step in steps if step not in shown], FOLDED, None)
    parts = [_sample_of(step, written[step], best) for step in shown]
    if folded:
        inside = "\n".join(_sample_of(step, written[step], None) for step in folded)
        parts.append(
            details(f"{count(len(folded), 'evaluation')} between these", inside, on_paper=False)
        )
    how = "The prompt is bold; the rest is sampled by the settings in the config's sample section."
    return section("What the model wrote", paragraph(how, "soft"), *parts)


def _sample_of(step: int, samples: Sequence[Sequence[str]], best_step: int | None) -> str:
    best = ", the best" if step == best_step else ""
    texts = "\n".join(continuation(prompt, output) for prompt, output in samples)
    return f"<h3>Step {step:,}{best}</h3>\n{texts}"


def _spread(steps: Sequence[int], most: int, wanted: int | None) -> list[int]:
    """At most `most` of the steps, the ends and the wanted one among them, spread evenly."""
    if len(steps) <= most:
        return list(steps)
    chosen = {steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)}
    if wanted is not None and wanted in steps and wanted not in chosen:
        chosen.remove(min(sorted(chosen)[1:-1], key=lambda step: abs(step - wanted)))
        chosen.add(wanted)
    return sorted(chosen)
