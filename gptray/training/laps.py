"""Where training time goes, by the clock of the first worker's host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# Of a step: reading its batch, the passes (with the all-reduce of gradients), clipping and the
# optimizer, waiting for a GPU; and besides steps: evaluations with their checkpoints.
PARTS = ("data", "forward_backward", "update", "wait", "evaluation", "log")
# Receives the steps made since the last call, and their seconds by part.
Timed = Callable[[int, Mapping[str, float]], None]


class Laps:
    """Adds up the seconds of each part; a part ends where the next begins.

    A GPU computes while the host goes on: there a part's seconds are those of launching it, and
    `wait` has the rest.
    """

    def __init__(self) -> None:
        self.tell: Timed = lambda steps, seconds: None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._ended = time.perf_counter()

    def end(self, part: str) -> None:
        """Everything since the last call was this part."""
        now = time.perf_counter()
        self._seconds[part] += now - self._ended
        self._ended = now

    def report(self, steps: int) -> None:
        """Tell what `steps` steps, and what came with them, have taken."""
        self.tell(steps, self._seconds)
        self._seconds = dict.fromkeys(PARTS, 0.0)
