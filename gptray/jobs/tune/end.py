"""The end of a sweep: the winner, the commands to run next, and the job's JSON line."""

from __future__ import annotations

import collections
import logging
from dataclasses import asdict

from gptray.commands import typed
from gptray.evaluation.forgetting import also_scores, change_sentence
from gptray.jobs.next_steps import of_model, settings_of, tell
from gptray.reports.sweep.more_text import text_lines
from gptray.tuning.more_trials import StoppedEarly
from gptray.tuning.seen import Seen
from gptray.tuning.sweep_record import OUTCOMES, Sweep, trial_changes
from gptray.tuning.text_shares import TextShares
from gptray.tuning.trial_plan import loses_text, lossy_ahead, score
from gptray.tuning.winner_commands import BEST, longer_words, winner_of

log = logging.getLogger("gptray")


def tell_winner(sweep: Sweep, place: str) -> None:
    """Log the winner, how much text it has seen, its settings, and the commands to run next.

    For a sweep over the amount of text, also logs what more text would gain. First come a warning
    for each better trial whose tokenizer loses text, and why the sweep ran fewer trials than
    planned, if it did. place: the sweep's public path or URI.
    """
    folder, winner = sweep.folder, winner_of(sweep)
    for trial in lossy_ahead(sweep.trials, winner):
        log.warning("%s", loses_text(trial))
    if stopped := StoppedEarly.of_sweep(folder):
        log.info("%s", stopped.words)
    seen = Seen(winner, sweep.config)
    bpb = f"{score(winner):.4f} bits per byte"
    log.info("winner: trial %s with %s; it has seen %s", winner.name, bpb, seen.words)
    if shares := TextShares.of(sweep):
        for lead, text in text_lines(shares):
            log.info("%s%s", lead, text)
    if changed := change_sentence(trial_changes(sweep.folder, winner)):
        log.info("%s", changed)
    commands = [
        typed("train", *longer_words(sweep, place)),
        of_model(folder, place)["generate"],
    ]
    settings = settings_of(winner.values) if winner.values else "the config as it is"
    tell(commands, settings=settings)


def outcome(sweep: Sweep, place: str) -> dict[str, object]:
    """The result of a finished sweep at `place`: the job's JSON line.

    `also` has bits per byte of the texts of evaluate.also, before the first step and of the model.
    `best_*` are the winner's, at its lowest validation loss: `best_lost` is the share of the text
    that its tokenizer loses, `best_tokens` the tokens trained on, counted each time they were read,
    `best_epochs` how often it read its share of the text, `best_text_share` how much of all
    training text it read (0 to 1). `baseline_val_bpb` is the unchanged config's. `steps_full` are
    the steps had no trial stopped early. `stopped_early` says why the sweep ran fewer trials than
    planned; null if it ran all.
    """
    winner = winner_of(sweep)
    baseline = next((one for one in sweep.trials if not one.values and one.best), None)
    counts = collections.Counter(trial.outcome for trial in sweep.trials)
    assert winner.best
    seen = Seen(winner, sweep.config)
    stopped = StoppedEarly.of_sweep(sweep.folder)
    return {
        "sweep_dir": place,
        "best_config": f"{place}/{BEST}",
        "best_trial": winner.name,
        "best_val_loss": winner.best["val_loss"],
        "best_val_bpb": winner.best["val_bpb"],
        "best_lost": winner.lost,
        "best_step": seen.step,
        "best_tokens": seen.tokens,
        "best_epochs": round(seen.epochs, 3),
        "best_text_share": round(seen.share, 4),
        "also": also_scores(trial_changes(sweep.folder, winner)),
        "baseline_val_bpb": baseline.best["val_bpb"] if baseline and baseline.best else None,
        "model_dir": f"{place}/model",
        "trials": len(sweep.trials),
        "stopped_early": asdict(stopped) if stopped else None,
        "trials_stopped_early": counts["stopped"] + counts["patience"],
        "outcomes": {name: counts[name] for name in OUTCOMES},
        "steps_run": sum(trial.step for trial in sweep.trials),
        "steps_full": sum(trial.max_steps for trial in sweep.trials),
    }
