"""How much of the training text a trial had read when its model was best."""

from __future__ import annotations

from dataclasses import dataclass

from gptray.config import Config, override
from gptray.tuning.sweep_record import Trial
from gptray.wording import count, magnitude


@dataclass(frozen=True)
class Seen:
    """Steps and tokens trained on; `epochs` are of the trial's `fraction` of the text.

    tokens: counted each time they were read. share: of the training split (0 to 1), read at least
    once.
    """

    step: int
    tokens: int
    epochs: float
    fraction: float

    @classmethod
    def of(cls, trial: Trial, config: Config) -> Seen:
        """Count up to a trial's best evaluation. config: the sweep's."""
        assert trial.best
        own, step = override(config, trial.values), trial.best["step"]
        return cls(step, step * own.tokens_per_step, trial.best["epoch"], own.data.fraction)

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
