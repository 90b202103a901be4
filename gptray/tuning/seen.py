"""How much of the training text a trial had read when its model was best."""

from __future__ import annotations

from gptray.config import Config, override
from gptray.tuning.sweep_record import Trial
from gptray.wording import count, magnitude


class Seen:
    """What a trial had trained on at its best evaluation. config: the sweep's.

    tokens: counted each time they were read. epochs: of the trial's `fraction` of the text. share:
    of the training split (0 to 1), read at least once.
    """

    def __init__(self, trial: Trial, config: Config) -> None:
        assert trial.best
        own, self.step = override(config, trial.values), trial.best["step"]
        self.tokens, self.epochs = self.step * own.tokens_per_step, trial.best["epoch"]
        self.fraction = own.data.fraction

    @property
    def share(self) -> float:
        return self.fraction * min(1.0, self.epochs)

    @property
    def words(self) -> str:
        """The end of a sentence that begins "it has seen"."""
        share = f"{100 * self.share:.2g}%" if self.share < 1 else "all"
        times = f" {self.epochs:.1f} times" if self.epochs >= 1.05 else ""
        part = " (data.fraction)" if self.fraction < 1 else ""
        return (
            f"{share} of the training text{part}{times}, in {count(self.step, 'step')} "
            f"({magnitude(self.tokens)} tokens)"
        )
