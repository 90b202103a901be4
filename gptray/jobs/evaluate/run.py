"""Evaluate: losses over whole splits, and what the model writes, by Ray actors.

The driver looks at the job, has the text prepared, shares out windows and passages, and puts
together what comes back. What the numbers mean is `gptray.evaluation`'s.
"""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gptray.config import Config, RunFailed
from gptray.data.tokens import TokenData
from gptray.evaluation.result import EVALUATION
from gptray.files import storing
from gptray.jobs.cluster import ray_cluster
from gptray.jobs.evaluate.check import Subject, check_text, look
from gptray.jobs.next_steps import of_model, tell
from gptray.jobs.report import Reporter
from gptray.wording import perplexity

if TYPE_CHECKING:
    from gptray.evaluation.result import Evaluation, SplitResult
    from gptray.jobs.evaluate.worker import Scorers

log = logging.getLogger("gptray")
# Of one task: enough that sending it costs nothing, few enough that all workers end together.
TASK_TOKENS = 16_384
# A GPU reads so many in a hundredth of a second, in which a task is just sent.
GPU_TASK_TOKENS = 262_144


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate a model as the config says; return the job's JSON line.

    Raises:
        UserError: a mistake in the config, the model or the text.
        RunFailed: a loss is not finite, workers keep dying, or evaluation.json cannot be written.
    """
    subject = look(config)
    log.info("evaluating %s", subject.model_dir)
    with ray_cluster():
        data = subject.prepare()
        check_text(subject, data)
        from gptray.jobs.evaluate.worker import Scorers

        evaluation = measure(subject, data, Scorers(subject, data))
    from gptray.evaluation.result import save_evaluation

    _say(evaluation)
    path = subject.folder / EVALUATION
    with storing(path):
        subject.folder.mkdir(parents=True, exist_ok=True)
        save_evaluation(evaluation, subject.folder)
    reporter = Reporter(subject.folder)
    reporter.write(running=False)
    uses = of_model(subject.run or subject.model_dir)
    tell([uses["generate"], uses["serve"]])
    return {**outcome(evaluation), "evaluation": str(path), "report": reporter.path}


def evaluation_plan(config: Config) -> list[tuple[str, str]]:
    """What the job would do, without torch or Ray; raises UserError as the job would."""
    subject = look(config)
    data = subject.prepared()
    rows = [
        ("model", str(subject.model_dir)),
        ("text", ", ".join(subject.source)),
        ("windows", f"{subject.block_size} tokens, {subject.stride} apart"),
    ]
    if data:
        for name, (windows, numbers) in subject.windows(data).items():
            tokens = sum(len(windows.counted(number)) for number in numbers)
            of = f" of {len(windows):,}" if len(numbers) < len(windows) else ""
            rows.append((name, f"{tokens:,} tokens in {len(numbers):,}{of} windows"))
    else:
        rows.append(("token data", "to be prepared first"))
    kind = "GPU" if config.compute.use_gpu else "CPU"
    return [
        *rows,
        ("passages", f"{config.evaluate.passages} to continue"),
        ("workers", f"{config.compute.num_workers} ({kind})"),
        ("files", f"{subject.folder}/: evaluation.json report.html and its PNGs"),
    ]


def measure(subject: Subject, data: TokenData, scorers: Scorers) -> Evaluation:
    """Everything that is measured of a model on a text."""
    from gptray.jobs.evaluate.continuations import measure_texts

    splits: dict[str, SplitResult | None] = dict.fromkeys(("train", "val", "test"))
    splits |= score_splits(subject, data, scorers)
    train, val = splits["train"], splits["val"]
    texts = measure_texts(subject, data, scorers)
    return {
        "model_dir": str(subject.model_dir),
        "model_sha256": subject.model_sha256,
        "tokenizer_sha256": subject.tokenizer.sha256,
        "source": subject.source,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "precision": scorers.precision,
        "block_size": subject.block_size,
        "stride": subject.stride,
        "splits": splits,
        "gap": val["loss"] - train["loss"] if train and val else None,
        **texts,
        "how": {"gap": "loss of val - loss of train, both with dropout off", **texts["how"]},
    }


def score_splits(subject: Subject, data: TokenData, scorers: Scorers) -> dict[str, SplitResult]:
    """The losses of every split of the text; of the training split, of a sample."""
    from gptray.evaluation.metrics import DocumentSums, split_result
    from gptray.jobs.evaluate.worker import Task

    results = {}
    task_tokens = GPU_TASK_TOKENS if subject.config.compute.use_gpu else TASK_TOKENS
    for name, (windows, numbers) in subject.windows(data).items():
        size = max(1, task_tokens // windows.block_size)
        ranges = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        tasks = [
            Task("score", (name, windows, part), windows.stride * len(part)) for part in ranges
        ]
        parts: list[DocumentSums] = scorers.run(f"scoring {name}", tasks)
        result = split_result(DocumentSums.joined(parts), data.splits[name], windows, len(numbers))
        if not math.isfinite(result["loss"]):
            raise RunFailed(f"the loss of {subject.model_dir} on {name} is {result['loss']}")
        log.info("%s", _line(name, result))
        results[name] = result
    return results


def _line(name: str, result: SplitResult) -> str:
    error = f" +- {result['stderr']:.4f}" if result["stderr"] is not None else ""
    ppl = perplexity(result["ppl"], places=2) if result["ppl"] is not None else "too large"
    return (
        f"{name:5}  loss {result['loss']:.4f}{error}  ppl {ppl}  bpb {result['bpb']:.4f}  "
        f"{result['tokens']:,} tokens"
    )


def _say(evaluation: Evaluation) -> None:
    """Log the scores of texts, each with what it is based on."""
    for name, scores in (("chrf", evaluation["chrf"]), ("bleu", evaluation["bleu"])):
        if scores:
            greedy, sampled = scores["greedy"], scores["sampled"]
            both = f"greedy {greedy['score']:.2f}  sampled {sampled['score']:.2f}"
            log.info("%s  %s  %d passages  %s", name, both, greedy["passages"], greedy["signature"])
    if not evaluation["bleu"]:
        log.info("bleu and chrf  %s", evaluation["how"]["bleu"])
    else:
        log.info("bleu counts %s", evaluation["how"]["bleu_compares"])
    long, short = evaluation["memorised_50"], evaluation["memorised_20"]
    if short is not None:
        more = f", {long:.1%} of 50" if long is not None else ""
        log.info("memorised  %s of 20 tokens in a row%s", f"{short:.1%}", more)
    else:
        log.info("memorised  %s", evaluation["how"]["memorised_20"])


def outcome(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of the job's JSON line."""
    line: dict[str, Any] = {"model_dir": evaluation["model_dir"]}
    for name in ("train", "val", "test"):
        split = evaluation["splits"][name]
        for key in ("loss", "stderr", "ppl", "bpb"):
            line[f"{name}_{key}"] = split[key] if split else None
        line[f"{name}_lost"] = split["lost_bytes"] / split["bytes"] if split else None
    bleu, chrf = evaluation["bleu"], evaluation["chrf"]
    return {
        **line,
        "gap": evaluation["gap"],
        "bleu": bleu and bleu["greedy"]["score"],
        "bleu_signature": bleu and bleu["greedy"]["signature"],
        "bleu_compares": bleu and evaluation["how"]["bleu_compares"],
        "chrf": chrf and chrf["greedy"]["score"],
        "memorised_20": evaluation["memorised_20"],
        "memorised_50": evaluation["memorised_50"],
    }
