"""A run's state, as a checkpoint's `trainer.json` holds it. No torch here, as in `checkpoint`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from gptray.config import Config
from gptray.storage.manifest import FORMAT
from gptray.storage.stored import read_object
from gptray.training.landing import Landing, Phase, Reason
from gptray.training.stopping import EarlyStopping


@dataclass(frozen=True)
class TrainerState:
    """The state of a run after `step` updates. `data` is the fingerprint of its token data.

    evaluated: the last evaluated step, whose score may be pending. losses: of the steps since the
    last row of metrics.jsonl. landing: None in the stable part.
    """

    step: NonNegativeInt
    progress: EarlyStopping
    data: str
    evaluated: NonNegativeInt = 0
    losses: tuple[float, ...] = ()
    landing: Landing | None = None

    @property
    def phase(self) -> Phase:
        """The part of the run that the step belongs to."""
        return "landing" if self.landing else "stable"

    @property
    def position(self) -> int:
        """The number of updates the weights have had; a landing discards those after `back_to`."""
        return self.landing.position(self.step) if self.landing else self.step

    def last_step(self, config: Config) -> int:
        """The last step of the phase, unless patience runs out earlier."""
        return self.landing.end if self.landing else config.stable_steps

    def cooled(self, config: Config) -> float:
        """The fraction (0 to 1) of the learning rate's decay that is over.

        The decay begins after the warm-up, or with the landing of a run that lands.
        """
        if self.landing:
            return (self.step - self.landing.start) / self.landing.steps
        if config.optim.lands:
            return 0.0
        warmup = config.optim.warmup_steps
        most = max(1, config.train.max_steps - warmup)
        return min(1.0, max(0, self.step - warmup) / most)

    def why_stop(self, config: Config) -> Reason | None:
        """Why the phase is over; None if it is not. A landing keeps the stable part's reason."""
        if self.step >= self.last_step(config):
            return self.landing.reason if self.landing else "max_steps"
        if self.landing or not self.progress.exhausted(config.train.patience):
            return None
        return "patience"

    def is_over(self, config: Config) -> bool:
        """Whether training has ended, including any landing."""
        has_landed = self.landing is not None or not config.optim.lands
        return has_landed and self.why_stop(config) is not None

    def to_json(self) -> str:
        """The text of `trainer.json`."""
        fields = json.loads(_STATE.dump_json(self, exclude_none=True))
        return json.dumps({"format": FORMAT, **fields}, indent=1)

    @classmethod
    def load(cls, folder: Path) -> TrainerState:
        """Read `trainer.json` of a checkpoint. Raises ValueError if it holds no valid state."""
        given = read_object(folder / "trainer.json")
        # Older checkpoints were only written at evaluations and lack this field.
        given = {"evaluated": given.get("step"), **given}
        try:
            state = _STATE.validate_json(json.dumps(given), strict=True)
        except ValidationError:
            raise ValueError("it does not hold the state of a run") from None
        progress, landing = state.progress, state.landing
        # Checkpoints older than train.ema lack `averaged`.
        said = cast(dict[str, object], given["progress"])
        if set(asdict(progress)) - said.keys() - {"averaged"}:
            raise ValueError("it does not hold the progress of a run")
        if max(progress.best_step, progress.bad_evals, state.evaluated) > state.step:
            raise ValueError("it names later steps than its own")
        if landing and not landing.back_to <= landing.start < state.step <= landing.end:
            raise ValueError("its step is outside its landing")
        return state


_STATE = TypeAdapter(TrainerState)
