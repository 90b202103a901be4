"""The evaluate job: measures losses over whole splits and generated text with Ray actors.

The driver has the text prepared and the model measured (`gptray.jobs.evaluate.measure`) and saves
the result. `gptray.evaluation` defines the measures.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gptray.config import Config, expect_config
from gptray.data.tokens import TokenData
from gptray.evaluation.result import EVALUATION, Evaluation, save_evaluation
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.shared_storage import check_shared_by_job
from gptray.jobs.evaluate.check import CheckedEvaluation, check, check_tokens
from gptray.jobs.evaluate.measure import measure
from gptray.jobs.next_steps import of_model, tell
from gptray.jobs.prepare.run import prepared_also, stored_text
from gptray.jobs.progress.reporter import Reporter
from gptray.storage.files import storing
from gptray.storage.remote_folder import RemoteFolder

log = logging.getLogger("gptray")


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate a model as the config says; return the job's JSON line.

    Raises UserError for a mistake in the config, the model or the text; RunFailed if a loss is not
    finite, workers keep dying or evaluation.json cannot be written.
    """
    return run(check(expect_config(config)))


def run(checked: CheckedEvaluation) -> dict[str, Any]:
    """Evaluate, and save the result and its report. Raises like `evaluate`."""
    config = checked.config
    log.info("evaluating %s", checked.model)
    with ray_cluster(wait_s=config.compute.wait_s):
        models = {"evaluate.model": [Path(model) for model in checked.models]}
        check_shared_by_job(config, checked.folder, read=models)
        text = stored_text(config, checked.text.request)
        check_tokens(checked, text)
        also = prepared_also(checked.also, config, text)
        data = TokenData.open(text.data_dir, also=also)
        evaluation = measure(checked, data)
    _say(evaluation)
    path = checked.folder / EVALUATION
    with storing(path):
        checked.folder.mkdir(parents=True, exist_ok=True)
        save_evaluation(evaluation, checked.folder)
    place = str(checked.home or checked.folder)
    reporter = Reporter(checked.folder, place)
    reporter.write(running=False)
    if not checked.others:
        named = checked.found.run or checked.found.folder
        uses = of_model(named, checked.found.place, adapter=checked.config.evaluate.adapter)
        tell([uses["generate"], uses["serve"]])
    if checked.home:
        _publish(checked.folder, checked.home)
    files = {"evaluation": f"{place}/{EVALUATION}", "report": reporter.path}
    return {**outcome(evaluation), **files}


def _publish(folder: Path, home: RemoteFolder) -> None:
    """Copy the results to the object store. Raises RunFailed."""
    for path in (*sorted(folder.glob("*.png")), folder / "report.html", folder / EVALUATION):
        if path.is_file():
            home.write(path.name, path.read_bytes())


def _say(evaluation: Evaluation) -> None:
    """Log the scores of generated text, each with its basis."""
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
        "also": {
            name: {key: split[key] for key in ("loss", "stderr", "ppl", "bpb")}
            for name, split in evaluation["also"].items()
        },
        "weights": evaluation["weights"],
        "quantized": evaluation["quantized"],
        "bleu": bleu and bleu["greedy"]["score"],
        "bleu_signature": bleu and bleu["greedy"]["signature"],
        "bleu_compares": bleu and evaluation["how"]["bleu_compares"],
        "chrf": chrf and chrf["greedy"]["score"],
        "memorised_20": evaluation["memorised_20"],
        "memorised_50": evaluation["memorised_50"],
    }
