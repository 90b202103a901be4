"""What an evaluation has found: the shape of `evaluation.json`, and how it is saved.

Every number is measured elsewhere; `how` says in words how each was computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict, cast

from gptray.config import UserError
from gptray.files import replacing
from gptray.stored import Unreadable, read_object

EVALUATION = "evaluation.json"


class SplitResult(TypedDict):
    """The loss on one split."""

    loss: float  # nats per token
    stderr: float | None  # of the loss, documents as clusters; None with fewer than two of them
    ppl: float | None  # exp(loss); None where no float holds it
    bpb: float  # bits per byte: loss x tokens / (ln 2 x bytes)
    lost_bytes: int  # that the tokenizer does not give back; each is charged 8 bits
    tokens: int  # scored
    bytes: int  # UTF-8 bytes of the text of these tokens
    documents: int
    how: str


class QuantizedResult(TypedDict):
    """What weights of one kind cost on a split's text, against the full ones, `none`."""

    weights: str
    loss: float  # as SplitResult's
    bpb: float
    loss_change: float  # against the full weights
    change_stderr: float | None  # of that, documents as clusters
    agreement: float  # share (0 to 1) of likeliest tokens that are the full weights' too
    weight_bytes: int  # of the blocks' linear layers; full ones in bf16


class TextScore(TypedDict):
    """A corpus score of sacrebleu's."""

    score: float  # 0 to 100
    signature: str
    passages: int


class TextScores(TypedDict):
    """The same score for continuations made greedily, and sampled as the config says."""

    greedy: TextScore
    sampled: TextScore


class Sample(TypedDict):
    """A held-out passage: its first half, its real second half, and what the model makes of it."""

    prompt: str
    reference: str
    greedy: str
    sampled: str


class TextMeasures(TypedDict):
    """What is measured of generated text. None: not measured, for want of text or not asked for.

    `distinct_*` and `repetition` are those of the sampled continuations; `memorised_*` are shares
    (0 to 1) of the n-grams in greedy continuations of training text. `how` has an entry for each.
    """

    bleu: TextScores | None
    chrf: TextScores | None
    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None
    memorised_20: float | None
    memorised_50: float | None
    samples: list[Sample]
    how: dict[str, str]


class Evaluation(TextMeasures):
    """All of `evaluation.json`: the losses too, each with its own `how`."""

    model_dir: str
    model_sha256: str
    tokenizer_sha256: str
    source: list[str]  # what data.source or evaluate.source says
    time: str  # ISO 8601, UTC
    precision: str  # fp32 or bf16: what the network computed in; losses are summed in float64
    block_size: int
    stride: int
    weights: str  # what quantize.weights says
    splits: dict[str, SplitResult | None]  # train, val, test
    gap: float | None  # loss of val - loss of train
    also: dict[str, SplitResult]  # the texts of evaluate.also, by name
    quantized: list[QuantizedResult]  # evaluate.quantized, after the full weights; or none


def save_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write `evaluation.json`, whole or not at all; return its path."""
    path = folder / EVALUATION
    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as draft:
        draft.write_text(text + "\n", "utf-8")
    return path


def load_evaluation(folder: Path) -> Evaluation | None:
    """What `evaluation.json` in a folder says; None without one. Raises UserError if damaged."""
    path = folder / EVALUATION
    try:
        evaluation = read_object(path)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise UserError(f"{path}: {error}; remove it and evaluate again") from None
    # Evaluations from before there were other texts lack them.
    return cast(Evaluation, {"also": {}, **evaluation})
