"""The report's part on evaluations: losses, the gap, scores of texts, memorisation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar, cast

from gptray.config import Config
from gptray.data.split import LONG_NAMES
from gptray.evaluation.forgetting import Change
from gptray.evaluation.model_commands import home_of, model_commands
from gptray.evaluation.result import Evaluation, QuantizedResult, SplitResult
from gptray.reports.page import Row, Table
from gptray.reports.run.diagnosis import Diagnosis
from gptray.storage.record import Event
from gptray.wording import perplexity, size_words

MEANS = "validation loss - training loss, dropout off in both; it grows as a model overfits"
# How many samples of held-out text to show.
SHOWN = 6
BEFORE = "bits per byte; before: the weights that the run began with, after: its best model"

SINGLE_SCORES = {
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct pairs of words",
    "repetition": "Repetition",
    "memorised_20": "Recited, 20 tokens in a row",
    "memorised_50": "Recited, 50 tokens in a row",
}

T = TypeVar("T")
# A measure's name, how it was computed, and a function that formats a result's value.
Measure = tuple[str, str, Callable[[T], str]]


def evaluation_sentence(evaluation: Evaluation) -> str:
    """How good the model is, in one or two sentences."""
    for name in ("test", "val", "train"):
        split = evaluation["splits"].get(name)
        if split:
            break
    else:
        return "No text was scored."
    ppl = f"perplexity {perplexity(split['ppl'])}, " if split["ppl"] is not None else ""
    text = (
        f"The loss on the {LONG_NAMES[name]} text is {split['loss']:.3f} nats per token: "
        f"{ppl}{split['bpb']:.3f} bits per byte."
    )
    recited = evaluation["memorised_50"]
    if recited is not None and recited >= 0.1:
        text += (
            f" It recites its training text: {recited:.1%} of its 50-token sequences occur there."
        )
    return text


def evaluation_tiles(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The most important numbers: test loss and scores of the model's text."""
    figures = []
    test = evaluation["splits"].get("test")
    if test:
        figures.append((f"{test['loss']:.3f}", f"test loss, {test['bpb']:.3f} bits per byte"))
    for name, scores in (("chrF", evaluation["chrf"]), ("BLEU", evaluation["bleu"])):
        if scores:
            best = scores["greedy"]
            tokenized = re.search(r"tok:([^|]+)", best["signature"])
            unit = f" ({tokenized[1]})" if tokenized else ""
            how = f"{name}{unit} of greedy continuations, {best['passages']} passages"
            figures.append((f"{best['score']:.1f}", how))
    return figures


def evaluation_view(evaluation: Evaluation) -> dict[str, object]:
    """The fields of `evaluation` in `evaluation.html.j2`."""
    return {
        "sentence": evaluation_sentence(evaluation),
        "splits": _splits(evaluation),
        "hows": _hows(evaluation),
        "quantized": _quantized(evaluation),
        "text_scores": _text_scores(evaluation),
        "single_scores": _single_scores(evaluation),
        "unscored": _unscored(evaluation),
        "samples": evaluation["samples"][:SHOWN],
        "identity": _identity(evaluation),
    }


def before_and_after(changes: Sequence[Change]) -> Table:
    """Bits per byte of the run's validation text and of other texts; empty without the latter."""
    rows = [
        Row(
            one.name or "Validation text",
            "" if one.name else BEFORE,
            (_or_dash(one.before, ".4f"), f"{one.after:.4f}"),
        )
        for one in changes
    ]
    return Table(["before", "after"], rows) if rows else Table([], [])


def _measured(columns: Sequence[str], measures: Sequence[Measure[T]], of: Sequence[T]) -> Table:
    """A table with a column for each result and a row for each measure; empty without results."""
    if not of:
        return Table(columns, [])
    return Table(columns, [Row(name, how, tuple(map(value, of))) for name, how, value in measures])


def _splits(evaluation: Evaluation) -> Table:
    splits = _scored(evaluation)
    measures: list[Measure[SplitResult]] = [
        ("Loss", "nats per token, dropout off", lambda split: f"{split['loss']:.4f}"),
        (
            "Standard error",
            evaluation["how"].get("stderr", "of the loss, by document"),
            lambda split: _or_dash(split["stderr"], ".4f"),
        ),
        ("Perplexity", "exp(loss)", lambda split: _or_dash(split["ppl"], ",.2f")),
        ("Bits per byte", "loss x tokens / (ln 2 x bytes)", lambda split: f"{split['bpb']:.4f}"),
        ("Tokens", "scored", lambda split: f"{split['tokens']:,}"),
        (
            "Documents",
            "that they come from, or turns of chats",
            lambda split: f"{split['documents']:,}",
        ),
    ]
    columns = [LONG_NAMES.get(name, name) for name in splits]
    return _measured(columns, measures, list(splits.values()))


def _scored(evaluation: Evaluation) -> dict[str, SplitResult]:
    """The scored splits, and the texts of evaluate.also."""
    splits = {name: split for name, split in evaluation["splits"].items() if split}
    return {**splits, **{f"also {name}": one for name, one in evaluation["also"].items()}}


def _hows(evaluation: Evaluation) -> list[str]:
    lines = [
        f"{LONG_NAMES.get(name, name)}: {split['how']}"
        for name, split in _scored(evaluation).items()
    ]
    if evaluation["gap"] is not None:
        how = evaluation["how"].get("gap", "validation loss - training loss")
        lines.append(f"gap {evaluation['gap']:+.4f}: {how}")
    return lines


def _quantized(evaluation: Evaluation) -> Table:
    results = evaluation.get("quantized") or []  # older files have none
    measures: list[Measure[QuantizedResult]] = [
        ("Loss", evaluation["how"].get("quantized", ""), lambda one: f"{one['loss']:.4f}"),
        (
            "Change",
            "of the loss, with its standard error by document",
            lambda one: f"{one['loss_change']:+.4f}{_error(one['change_stderr'])}",
        ),
        ("Bits per byte", "loss x tokens / (ln 2 x bytes)", lambda one: f"{one['bpb']:.4f}"),
        (
            "Greedy tokens that agree",
            "the likeliest next token is the same as with full weights",
            lambda one: f"{one['agreement']:.1%}",
        ),
        (
            "Size",
            "of the weights of the blocks' linear layers; full ones in bf16",
            lambda one: size_words(one["weight_bytes"]),
        ),
    ]
    kinds = [one["weights"].replace("none", "full") for one in results]
    return _measured(kinds, measures, results)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"


def _text_scores(evaluation: Evaluation) -> Table:
    rows, hows = [], evaluation["how"]
    both = ("chrf", "chrF", evaluation["chrf"]), ("bleu", "BLEU", evaluation["bleu"])
    for key, name, scores in both:
        how = hows.get(key, "")
        if scores:
            greedy, sampled = scores["greedy"], scores["sampled"]
            how = f"{how} [{greedy['signature']}]".strip()
            if key == "bleu" and "bleu_compares" in hows:
                how += f". It counts {hows['bleu_compares']}"
            rows.append(Row(name, how, (f"{greedy['score']:.2f}", f"{sampled['score']:.2f}")))
        elif how:
            rows.append(Row(name, how, ("-", "-")))
    return Table(["greedy", "sampled"], rows)


def _single_scores(evaluation: Evaluation) -> Table:
    scores, hows = cast(Mapping[str, float | None], evaluation), evaluation["how"]
    rows = [
        Row(name, hows.get(key, ""), (_or_dash(scores[key], ".1%"),))
        for key, name in SINGLE_SCORES.items()
        if scores[key] is not None or hows.get(key)
    ]
    return Table([], rows)


def _unscored(evaluation: Evaluation) -> str:
    """Why no measure of generated text was taken; empty if any was, or for several reasons."""
    scores, keys = cast(Mapping[str, object], evaluation), ("chrf", "bleu", *SINGLE_SCORES)
    reasons = {evaluation["how"].get(key, "") for key in keys}
    any_taken = any(scores[key] is not None for key in keys)
    return "" if any_taken or len(reasons) > 1 else reasons.pop()


def _identity(evaluation: Evaluation) -> Table:
    rows = [
        Row("Model", "", (evaluation["model_dir"],)),
        Row("Model's sha256", "", (evaluation["model_sha256"],)),
        Row("Tokenizer's sha256", "", (evaluation["tokenizer_sha256"],)),
        Row("Text", "", (", ".join(evaluation["source"]),)),
        Row("Window", "tokens that the model sees at a time", (f"{evaluation['block_size']:,}",)),
        Row("Weights", "none: not quantized", (evaluation.get("weights", "none"),)),
        Row("Stride", "tokens between two windows", (f"{evaluation['stride']:,}",)),
        Row("Time", "UTC", (f"{datetime.fromisoformat(evaluation['time']):%Y-%m-%d %H:%M:%S}",)),
    ]
    return Table([], rows)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


@dataclass(frozen=True)
class Gap:
    """The gap of a run's best model, and how it was measured.

    train_loss: on a sample of the training split, dropout off. None: not measured; `how` says why.
    """

    value: float | None
    train_loss: float | None
    how: str


def gap_of(
    folder: Path, config: Config, diagnosis: Diagnosis, evaluation: Evaluation | None
) -> Gap:
    """The gap from an evaluation, or from training if it adds no noise."""
    if evaluation and evaluation["gap"] is not None:
        train = evaluation["splits"]["train"]
        assert train
        return Gap(evaluation["gap"], train["loss"], f"{MEANS}; measured by jobs/evaluate.py")
    best = diagnosis.chosen
    noise = noise_of(config)
    if best and not noise:
        return Gap(best.gap, None, f"{MEANS}; over the batches before that step")
    missing = f"not measured: training has {noise} on" if noise else "not measured yet"
    command = model_commands(folder, home_of(config))["evaluate"]
    return Gap(None, None, f"{MEANS}; {missing}; {command} measures it")


def noise_of(config: Config) -> str:
    """The noise that raises only training loss, such as "dropout"; empty if there is none."""
    dropout = config.model.dropout or (config.lora.rank and config.lora.dropout)
    kinds = {"dropout": dropout, "token replacement": config.data.token_replacement}
    return " and ".join(kind for kind, share in kinds.items() if share)


def is_stale(evaluation: Evaluation, events: Sequence[Event]) -> bool:
    """Whether the run has found a better model since it was evaluated."""
    found = [event["time"] for event in events if event["event"] == "evaluated" and event["best"]]
    return bool(found) and found[-1] > datetime.fromisoformat(evaluation["time"]).timestamp() + 1
