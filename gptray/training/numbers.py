"""A step's loss, gradient norm and workers' requests, read from a GPU during the next step.

Reading them at once would leave the GPU idle until the host launches the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from gptray.training.stopping import NonFiniteLoss


class Action(IntEnum):
    """What a worker may ask all workers to do after a step: save, or save and leave the loop."""

    NONE = 0
    SAVE = 1
    LEAVE = 2


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of update `step` (from 1), which may still be in flight from a GPU."""

    step: int
    lr: float
    # Loss of the global batch, gradient norm before clipping, how many workers ask to save and
    # to leave; float64, (4,), in host memory.
    _numbers: Tensor
    _arrival: torch.cuda.Event | None

    @classmethod
    def send(cls, step: int, lr: float, numbers: Tensor) -> StepNumbers:
        """Start copying the numbers to the host, without waiting."""
        if numbers.device.type != "cuda":
            return cls(step, lr, numbers, None)
        host = torch.empty(4, dtype=torch.float64, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record()
        return cls(step, lr, host, arrival)

    def read(self) -> tuple[float, float, Action]:
        """Wait for the loss, the gradient norm and the request, the same on all workers.

        Does not wait for kernels launched since. Raises NonFiniteLoss if the loss or the gradient
        norm is NaN or infinite.
        """
        if self._arrival:
            self._arrival.synchronize()
        loss, grad_norm, saving, leaving = self._numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}, lr {self.lr:g}"
            )
        request = Action.LEAVE if leaving else Action.SAVE if saving else Action.NONE
        return loss, grad_norm, request
