"""Where training time goes, by the clock of the first worker's host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# Parts of a step: reading its batch, forward and backward (with the all-reduce of gradients),
# clipping and the optimizer, waiting for a GPU. Between steps: evaluations (with their
# checkpoints) and logging.
PARTS = ("data", "forward_backward", "update", "wait", "evaluation", "log")
# Receives the number of steps since the last call, and the seconds of each part.
Timed = Callable[[int, Mapping[str, float]], None]


class Laps:
    """Adds up the seconds of each part; a part ends where the next begins.

    A GPU computes while the host continues, so there a part's seconds are those of launching its
    kernels, and `wait` has the rest.
    """

    def __init__(self) -> None:
        self.tell: Timed | None = None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._ended = time.perf_counter()

    def end(self, part: str) -> None:
        """Count all time since the last call as this part's."""
        now = time.perf_counter()
        self._seconds[part] += now - self._ended
        self._ended = now

    def report(self, steps: int) -> None:
        """Tell the seconds of the last `steps` steps and of what came between them."""
        if self.tell:
            self.tell(steps, self._seconds)
        self._seconds = dict.fromkeys(PARTS, 0.0)
