"""The results of an evaluation: the schema of `evaluation.json`, reading and writing it.

The numbers are computed elsewhere; `how` explains each method in words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict, cast

from gptray.config import UserError
from gptray.storage.files import replacing
from gptray.storage.stored import Unreadable, read_object

EVALUATION = "evaluation.json"


class SplitResult(TypedDict):
    """The loss on one split."""

    loss: float  # nats per token
    stderr: float | None  # of the loss, clustered by document; None for fewer than two documents
    ppl: float | None  # exp(loss); None if it overflows
    bpb: float  # bits per byte: loss x tokens / (ln 2 x bytes)
    lost_bytes: int  # that decoding the tokens does not restore; each is charged 8 bits
    tokens: int  # scored
    bytes: int  # UTF-8 bytes of these tokens' text
    documents: int  # or turns of chats, see `TokenSplit.ends_turns`
    how: str


class QuantizedResult(TypedDict):
    """The cost of one kind of weights on a split, relative to the full weights, `none`."""

    weights: str
    loss: float  # nats per token
    bpb: float
    loss_change: float  # against the full weights
    change_stderr: float | None  # of loss_change, clustered by document
    agreement: float  # share (0 to 1) of likeliest tokens that are also the full weights'
    weight_bytes: int  # of the blocks' linear layers; full ones in bf16


class TextScore(TypedDict):
    """A corpus score from sacrebleu."""

    score: float  # 0 to 100
    signature: str
    passages: int


class TextScores(TypedDict):
    """The score of greedy continuations, and of those sampled as the config says."""

    greedy: TextScore
    sampled: TextScore


class Sample(TypedDict):
    """A held-out passage: its first half, its real second half and the model's continuations."""

    prompt: str
    reference: str
    greedy: str
    sampled: str


class TextMeasures(TypedDict):
    """Measures of generated text. None: not measured, because unwanted or for lack of text.

    `distinct_*` and `repetition` are of the sampled continuations; `memorised_*` are shares (0 to
    1) of the n-grams in greedy continuations of training text. `how` has an entry for each.
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
    """All of `evaluation.json`, including the losses, each with its own `how`."""

    model_dir: str
    model_sha256: str
    tokenizer_sha256: str
    source: list[str]  # data.source or evaluate.source
    time: str  # ISO 8601, UTC
    precision: str  # fp32 or bf16: what the network computed in; losses are summed in float64
    block_size: int
    stride: int
    weights: str  # quantize.weights
    splits: dict[str, SplitResult | None]  # train, val, test
    gap: float | None  # loss of val - loss of train
    also: dict[str, SplitResult]  # the texts of evaluate.also, by name
    quantized: list[QuantizedResult]  # the full weights, then evaluate.quantized; or empty


def save_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write `evaluation.json` atomically; return its path."""
    path = folder / EVALUATION
    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as draft:
        draft.write_text(text + "\n", "utf-8")
    return path


def load_evaluation(folder: Path) -> Evaluation | None:
    """Read a folder's `evaluation.json`; None if there is none. Raises UserError if damaged."""
    path = folder / EVALUATION
    try:
        evaluation = read_object(path)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise UserError(f"{path}: {error}; remove it and evaluate again") from None
    # Evaluations older than evaluate.also lack it.
    return cast(Evaluation, {"also": {}, **evaluation})
