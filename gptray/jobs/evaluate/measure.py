"""Measures a model on a text: divides windows and passages among actors and joins the answers."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime

from gptray.config import RunFailed
from gptray.data.scoring import Windows
from gptray.data.split import LONG_NAMES
from gptray.data.tokens import TokenData
from gptray.evaluation.metrics import DocumentSums, quantized_results, split_result
from gptray.evaluation.result import Evaluation, QuantizedResult, SplitResult
from gptray.jobs.evaluate.check import CheckedEvaluation
from gptray.jobs.evaluate.continuations import measure_texts
from gptray.jobs.evaluate.scorers import Scorers
from gptray.jobs.evaluate.worker import Call
from gptray.model.shape import read_shape
from gptray.model.weight_bytes import linear_bytes
from gptray.wording import perplexity, size_words

log = logging.getLogger("gptray")
# Tokens of one call: enough to make sending it negligible, few enough to balance the workers.
CALL_TOKENS = 16_384
# A GPU would read CALL_TOKENS about as fast as a call is sent, in a hundredth of a second.
GPU_CALL_TOKENS = 262_144
COMPARED = (
    "every token of the {} text, read as an engine reads a prompt, with the full weights and with "
    "each kind"
)


def measure(checked: CheckedEvaluation, data: TokenData) -> Evaluation:
    """All measures of a model on a text. Needs Ray.

    Raises UserError or RunFailed like `Scorers.run`, and RunFailed for a loss that is not finite.
    """
    with Scorers(checked, data) as scorers:
        scores = score_splits(checked, data, scorers)
        quantized = compare_weights(checked, data, scorers)
        texts = measure_texts(checked, data, scorers)
        precision = scorers.precision
    splits = {name: scores.get(name) for name in ("train", "val", "test")}
    train, val = splits["train"], splits["val"]
    return {
        "model_dir": checked.model,
        "model_sha256": checked.model_sha256,
        "tokenizer_sha256": checked.tokenizer.sha256,
        "source": checked.source,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "precision": precision,
        "block_size": checked.block_size,
        "stride": checked.stride,
        "weights": checked.config.quantize.weights,
        "splits": splits,
        "also": {name: scores[f"also/{name}"] for name in data.also},
        "gap": val["loss"] - train["loss"] if train and val else None,
        "quantized": quantized,
        **texts,
        "how": {
            "gap": "loss of val - loss of train, both with dropout off",
            **({"quantized": COMPARED.format(LONG_NAMES[_held_out(data)])} if quantized else {}),
            **texts["how"],
        },
    }


def score_splits(
    checked: CheckedEvaluation, data: TokenData, scorers: Scorers
) -> dict[str, SplitResult]:
    """The losses on every split (a sample of the training split), and on evaluate.also's texts."""
    results = {}
    for name, (windows, numbers) in checked.windows(data).items():
        calls = _calls("score", name, windows, numbers, checked)
        parts: list[DocumentSums] = scorers.run(f"scoring {name}", calls)
        result = split_result(DocumentSums.joined(parts), data.scored[name], windows, numbers)
        if not math.isfinite(result["loss"]):
            raise RunFailed(f"the loss of {checked.model} on {name} is {result['loss']}")
        log.info("%s", _line(name, result))
        results[name] = result
    return results


def compare_weights(
    checked: CheckedEvaluation, data: TokenData, scorers: Scorers
) -> list[QuantizedResult]:
    """The cost of each kind in evaluate.quantized on the test or else the validation split."""
    others = checked.config.evaluate.quantized
    if not others:
        return []
    name = _held_out(data)
    windows, numbers = checked.windows(data)[name]
    kinds = ["none", *others]
    calls = _calls("compare", name, windows, numbers, checked)
    parts: list[list[DocumentSums]] = scorers.run(f"comparing weights on {name}", calls)
    sums = [DocumentSums.joined(each) for each in zip(*parts, strict=True)]
    shape = read_shape(checked.found.folder)
    sizes = [linear_bytes(shape, kind) for kind in kinds]
    results = quantized_results(kinds, sums, sizes, data.splits[name], windows, numbers)
    for result in results:
        size = size_words(result["weight_bytes"])
        line = f"{result['weights']:5}  loss {result['loss']:.4f}  bpb {result['bpb']:.4f}  {size}"
        if result["weights"] != "none":
            line += f"  {result['agreement']:.2%} of greedy tokens as with full weights"
        log.info("weights %s", line)
    return results


def _held_out(data: TokenData) -> str:
    return "test" if data.test else "val"


def _calls(
    method: str, name: str, windows: Windows, numbers: list[int], checked: CheckedEvaluation
) -> list[Call]:
    """Calls of a method that takes windows of a split, covering these window numbers."""
    tokens = GPU_CALL_TOKENS if checked.config.compute.use_gpu else CALL_TOKENS
    size = max(1, tokens // windows.block_size)
    ranges = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return [Call(method, (name, windows, part), windows.stride * len(part)) for part in ranges]


def _line(name: str, result: SplitResult) -> str:
    error = f" +- {result['stderr']:.4f}" if result["stderr"] is not None else ""
    ppl = perplexity(result["ppl"], places=2) if result["ppl"] is not None else "too large"
    name = name.removeprefix("also/")
    return (
        f"{name:5}  loss {result['loss']:.4f}{error}  ppl {ppl}  bpb {result['bpb']:.4f}  "
        f"{result['tokens']:,} tokens"
    )
