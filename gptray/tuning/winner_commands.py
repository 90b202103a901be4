"""Commands that use a finished sweep's winner, ready for a reader to paste."""

from __future__ import annotations

from gptray.commands import job_command
from gptray.config import load_saved
from gptray.evaluation.model_commands import home_of, model_commands
from gptray.tuning.sweep_record import Sweep, Trial

BEST = "best.yaml"
# The command that trains the winner longer multiplies its steps by this.
LONGER = 4


def winner_of(sweep: Sweep) -> Trial:
    """The trial that won a finished sweep."""
    return next(trial for trial in sweep.trials if trial.name == sweep.winner)


def longer_words(sweep: Sweep, place: str) -> list[str]:
    """The arguments that train a finished sweep's winner longer, on all of the text.

    place: the sweep's public path or URI.
    """
    folder, best = sweep.folder, load_saved(sweep.folder / BEST)
    words = [f"train.max_steps={LONGER * winner_of(sweep).max_steps}", f"name={folder.name}-long"]
    if best.data.fraction < 1:
        words.insert(0, "data.fraction=1")
    if best.train.patience is None:
        words.insert(0, "train.patience=5")
    if sweep.config.compute.cpus_per_worker is None:  # the trial's are those of one of many
        words.append("compute.cpus_per_worker=null")
    return ["--config", f"{place}/{BEST}", *words]


def winner_commands(sweep: Sweep) -> list[str]:
    """The commands that train the winner longer and use its model; none before there is one."""
    if sweep.winner is None or not (sweep.folder / BEST).is_file():
        return []
    place = home_of(sweep.config) or str(sweep.folder.resolve())
    uses = model_commands(sweep.folder, place)
    return [job_command("train", *longer_words(sweep, place)), uses["generate"], uses["serve"]]
