"""The report's part on the run: its state, numbers, samples, config and environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from gptray.config import Config, dump, flatten
from gptray.data.split import LONG_NAMES
from gptray.evaluation.forgetting import change_sentence, changes_of
from gptray.evaluation.model_commands import home_of, model_commands, train_command
from gptray.evaluation.result import Evaluation
from gptray.reports.page import SHORT, Row, Table
from gptray.reports.run.advice import Advice, advise
from gptray.reports.run.diagnosis import Diagnosis, has_failed
from gptray.reports.run.findings import Gap, before_and_after, evaluation_tiles, gap_of, noise_of
from gptray.reports.run.samples import samples_of
from gptray.reports.run.sentence import sentence
from gptray.storage.record import Event, MetricsRow, last_event, seconds_trained, teachers_of
from gptray.training.landing import rows_of
from gptray.wording import count, magnitude, perplexity, time_words

Figure = Literal["val_loss", "train_loss", "val_ppl", "val_bpb", "epoch", "lr"]


@dataclass(frozen=True)
class RunRecord:
    """A run folder's config, rows and events, and their diagnosis.

    evaluation: of the current best model; None if there is none.
    """

    folder: Path
    config: Config
    rows: Sequence[MetricsRow]
    events: Sequence[Event]
    diagnosis: Diagnosis
    evaluation: Evaluation | None

    @property
    def gap(self) -> Gap:
        return gap_of(self.folder, self.config, self.diagnosis, self.evaluation)


def run_view(run: RunRecord) -> dict[str, object]:
    """The fields of `run` in `run.html.j2`."""
    advice, changes = advise(run.diagnosis, run.config), changes_of(run.rows, run.events)
    loses = next((event["loses"] for event in reversed(run.events) if event.get("loses")), "")
    return {
        "sentence": sentence(run.diagnosis, run.config),
        "advice": [(item, _command(run, item)) for item in advice],
        "loses": f"{loses[:1].upper()}{loses[1:]}",
        "changed": change_sentence(changes),
        "before_and_after": before_and_after(changes),
        "tiles": _tiles(run),
        "commands": _next_commands(run),
        "at_three_steps": _at_three_steps(run),
        "of_the_run": _of_the_run(run),
        "samples": samples_of(run.events, run.diagnosis),
        "happened": _happened(run),
        "config": _config(run.config),
        "whole_config": dump(run.config),
        "environment": _environment(run),
    }


def run_state(run: RunRecord, *, running: bool) -> tuple[str, str]:
    """The run's state: a word, and the rest of the line."""
    diagnosis = run.diagnosis
    step, steps = diagnosis.last_step, diagnosis.max_steps
    of_all = f"step {step:,} of {steps:,}"
    if running:
        return "running", f": {of_all} ({100 * step // steps}%)"
    if diagnosis.ended == "max_steps":
        return "finished", f" after {count(step, 'step')}"
    if diagnosis.ended == "patience":
        how = " and landed" if diagnosis.landed else ""
        return "stopped early", f"{how} at {of_all}"
    if diagnosis.ended == "non_finite":
        return "failed", f" after {of_all}"
    word = "failed" if has_failed(run.events) else "interrupted"
    return word, f" after {of_all}; the same command resumes it"


def _command(run: RunRecord, advice: Advice) -> str | None:
    """The command that takes a piece of advice; None if there is none."""
    if not advice.keys or run.diagnosis.ended is None:
        return None
    return train_command(run.folder, run.config, advice.keys, resumes=advice.resumes)


def _next_commands(run: RunRecord) -> list[str]:
    """The commands that use the model of a finished run; empty before that."""
    if run.diagnosis.ended is None or run.diagnosis.best is None:
        return []
    commands = model_commands(run.folder, home_of(run.config))
    if run.evaluation is not None:
        del commands["evaluate"]
    return list(commands.values())


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    best = run.diagnosis.chosen
    if best is None:
        return []
    row = _row_at(run, best.step)
    figures = [
        (f"{best.val_loss:.3f}", f"best validation loss, step {best.step:,}"),
        (perplexity(row["val_ppl"]), "its perplexity"),
        (f"{row['val_bpb']:.3f}", "its bits per byte"),
    ]
    gap = run.gap.value
    missing = f"not measured yet: training has {noise_of(run.config)} on"
    how = missing if gap is None else "dropout off in both"
    figures.append(("-" if gap is None else f"{gap:+.3f}", f"gap, {how}"))
    return figures + (evaluation_tiles(run.evaluation) if run.evaluation else [])


def _row_at(run: RunRecord, step: int) -> MetricsRow:
    return next(row for row in run.rows if row["step"] == step and "val_loss" in row)


def _at_three_steps(run: RunRecord) -> Table:
    """The metrics at the best evaluation, where validation loss turned, and at the last.

    A landing's best evaluation is in the first column if it is the best of all.
    """
    diagnosis = run.diagnosis
    named = [("best", diagnosis.best), ("turned", diagnosis.turned), ("last", diagnosis.last)]
    if diagnosis.verdict != "overfitting":
        named.pop(1)
    if landed := diagnosis.landed:
        named.insert(0 if landed.gain > 0 else len(named), ("landed", landed.best))
    chosen = [(name, _row_at(run, point.step)) for name, point in named if point]
    if diagnosis.best == diagnosis.last:
        chosen = [one for one in chosen if one[0] != "last"]
    noise = noise_of(run.config)
    with_noise = f"{noise} on" if noise else "no dropout"
    numbers: list[tuple[str, Figure, str, str]] = [
        ("Validation loss", "val_loss", ".4f", VALIDATION_LOSS),
        ("Training loss", "train_loss", ".4f", f"{TRAINING_LOSS}, {with_noise}"),
        ("Perplexity", "val_ppl", ",.2f", "exp(validation loss)"),
        ("Bits per byte", "val_bpb", ".4f", BITS_PER_BYTE),
        ("Epochs", "epoch", ".2f", "how often the training text has been read"),
        ("Learning rate", "lr", ".3g", "of that step"),
    ]
    rows = [
        Row(name, how, tuple(_figure(row[key], key, form) for _, row in chosen))
        for name, key, form, how in numbers
    ]
    if not chosen:
        return Table([], [])
    rows[2:2] = _gap_rows(run.gap, len(chosen))
    return Table([f"{name}: step\u00a0{row['step']:,}" for name, row in chosen], rows)


def _gap_rows(gap: Gap, columns: int) -> list[Row]:
    """The gap at the best step, the first column; it is not measured at the others."""
    rest = ("-",) * (columns - 1)
    rows = []
    if gap.train_loss is not None:
        how = "nats per token of a sample of the training split, dropout off"
        rows.append(Row("Training loss, dropout off", how, (f"{gap.train_loss:.4f}", *rest)))
    value = "-" if gap.value is None else f"{gap.value:+.4f}"
    return [*rows, Row("Gap", gap.how, (value, *rest))]


def _figure(value: float, key: str, form: str) -> str:
    return perplexity(value, places=2) if key == "val_ppl" else f"{value:{form}}"


VALIDATION_LOSS = (
    "nats per token: minus the logarithm of the probability of the right token, averaged over the "
    "whole validation split, dropout off"
)
TRAINING_LOSS = "nats per token of the batches since the previous row"
BITS_PER_BYTE = "validation loss x tokens / (ln 2 x bytes of text); compares across tokenizers"


def _of_the_run(run: RunRecord) -> Table:
    diagnosis, config = run.diagnosis, run.config
    steps = f"{diagnosis.last_step:,} of {diagnosis.max_steps:,}"
    rows = [Row("Steps", "optimizer updates, out of train.max_steps", (steps,))]
    if diagnosis.base is not None:
        how = "validation loss of model.init_from's weights, before the first step"
        rows.append(Row("Loss of the base model", how, (f"{diagnosis.base:.4f}",)))
    if taught := teachers_of(run.events):
        names = ", ".join(f"{name} (sha256 {digest[:12]})" for name, digest in taught.items())
        how = f"{config.train.teacher_weight:g} of the loss is against their average: {names}"
        rows.append(Row("Teachers", how, (f"{len(taught)}",)))
    if seconds := seconds_trained(run.events):
        how = "from start to last event, without pauses"
        rows.append(Row("Time", how, (time_words(seconds),)))
    if rates := [row["tokens_per_sec"] for row in run.rows]:
        rate = f"{median(rates):,.0f}"
        rows.append(Row("Tokens per second", "median of the rows, without evaluations", (rate,)))
    tokens = config.tokens_per_step * diagnosis.last_step
    rows.append(Row("Tokens trained on", "steps x tokens per step", (magnitude(tokens),)))
    start = last_event(run.events, "start")
    text = start.get("text", {}) if start else {}
    for name, words in text.items():
        how = "documents, size and share of all text, tokens"
        rows.append(Row(f"{LONG_NAMES[name].capitalize()} text", how, (words,)))
    read = [row for row in rows_of("stable", run.rows) if row.get("epoch")]
    if read and not text:
        how = "tokens trained on / epochs"
        tokens = round(read[-1]["step"] * config.tokens_per_step / read[-1]["epoch"])
        rows.append(Row("Training text", how, (f"about {magnitude(tokens)} tokens",)))
    if diagnosis.parameters:
        adapter = f"an adapter of rank {config.lora.rank}"
        how = adapter if config.lora.rank else "tied weights counted once"
        rows.append(Row("Parameters trained", how, (magnitude(diagnosis.parameters),)))
    return Table([], rows + _landing_rows(diagnosis) + _cost(diagnosis))


def _landing_rows(diagnosis: Diagnosis) -> list[Row]:
    landed = diagnosis.landed
    if landed is None:
        return []
    how = (
        "nats by which its lowest validation loss is below the lowest before it; it went back "
        f"from step {landed.start:,} to step {landed.back_to:,}"
    )
    return [Row("Gain of the landing", how, (f"{landed.gain:+.4f}",))]


def _cost(diagnosis: Diagnosis) -> list[Row]:
    rows = []
    if diagnosis.noise:
        how = "of validation loss around its trend, nats: 1.48 x median |third difference| / 4.47"
        rows.append(Row("Noise", how, (f"{diagnosis.noise:.4f}",)))
    after, saved = diagnosis.steps_after_best, diagnosis.steps_saved
    how = "steps x median time per step from one evaluation to the next, evaluation included"
    for name, steps in (("After the best step", after), ("Saved by early stopping", saved)):
        seconds = diagnosis.seconds(steps)
        if steps and seconds is not None:
            rows.append(Row(name, how, (f"{count(steps, 'step')}, {time_words(seconds)}",)))
    return rows


def _happened(run: RunRecord) -> list[str]:
    """Warnings about the text, restarts, damaged checkpoints, failures."""
    start = last_event(run.events, "start")
    lines = list(start.get("warnings", [])) if start else []
    for event in run.events:
        if event["event"] == "start" and event["step"]:
            lines.append(f"resumed after step {event['step']:,}")
        elif event.get("message"):
            lines.append(event["message"])
    return lines


def _config(config: Config) -> Table:
    """The keys that differ from the defaults."""
    defaults = flatten(Config())
    rows = []
    for key, value in flatten(config).items():
        if value != defaults[key] and key not in ("name", "storage_path"):
            text = _value(value)
            below, beside = ("", text) if len(text) <= SHORT else (text, "")
            rows.append(Row(key, below, (beside, _value(defaults[key]))))
    return Table(["this run", "default"], rows)


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(run: RunRecord) -> Table:
    """The workers, devices and libraries of the run's last start."""
    start = last_event(run.events, "start")
    names = {"workers": "Workers", "device": "Device of each", "dtype": "Computed in"}
    if start is None:
        return Table([], [])
    told = dict(start)
    rows = [Row(name, "", (str(told[key]),)) for key, name in names.items() if key in told]
    rows += [Row(name, "", (number,)) for name, number in start.get("versions", {}).items()]
    return Table([], rows)
