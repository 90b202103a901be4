"""A step's loss, gradient norm and workers' wishes, read from a GPU during the next step.

Waiting for them at once would leave the GPU idle until the host has launched the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from gptray.training.stopping import NonFiniteLoss


class Wish(IntEnum):
    """What a worker may ask of all: to save at the step at hand, and to leave the loop then."""

    NONE = 0
    SAVE = 1
    LEAVE = 2


@dataclass(frozen=True)
class StepNumbers:
    """Of update `step` (from 1); from a GPU the numbers may still be on their way."""

    step: int
    lr: float
    # Loss of the global batch, gradient norm before clipping, and how many workers wish to save
    # and to leave; float64, (4), in the host's memory.
    _numbers: Tensor
    _arrival: torch.cuda.Event | None

    @classmethod
    def send(cls, step: int, lr: float, numbers: Tensor) -> StepNumbers:
        """Start the way of the numbers to the host, without a wait."""
        if numbers.device.type != "cuda":
            return cls(step, lr, numbers, None)
        host = torch.empty(4, dtype=torch.float64, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record()
        return cls(step, lr, host, arrival)

    def read(self) -> tuple[float, float, Wish]:
        """Wait for the loss, the gradient norm and the workers' wish, the same on each of them.

        It waits for nothing that was launched after them.
        Raises NonFiniteLoss if one of them is NaN or infinite.
        """
        if self._arrival:
            self._arrival.synchronize()
        loss, grad_norm, saving, leaving = self._numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}, lr {self.lr:g}"
            )
        return loss, grad_norm, Wish.LEAVE if leaving else Wish.SAVE if saving else Wish.NONE
