"""Loss and gradient norm of a step, read from a GPU while the next step runs.

To wait for them at once would leave the GPU without work until the host has launched the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptray.training.stopping import NonFiniteLoss


@dataclass(frozen=True)
class StepNumbers:
    """What update `step` (from 1) was made with; from a GPU the pair may still be on its way."""

    step: int
    lr: float
    # Loss of the global batch and gradient norm before clipping, float64, in the host's memory.
    _pair: Tensor
    _arrival: torch.cuda.Event | None

    @classmethod
    def send(cls, step: int, lr: float, pair: Tensor) -> StepNumbers:
        """Start the way of a pair to the host, without a wait."""
        if pair.device.type != "cuda":
            return cls(step, lr, pair, None)
        host = torch.empty(2, dtype=torch.float64, pin_memory=True)
        host.copy_(pair, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record()
        return cls(step, lr, host, arrival)

    def read(self) -> tuple[float, float]:
        """Wait for the numbers, but for nothing that was launched after them.

        Raises:
            NonFiniteLoss: one of them is NaN or infinite.
        """
        if self._arrival:
            self._arrival.synchronize()
        loss, grad_norm = self._pair.tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}, lr {self.lr:g}"
            )
        return loss, grad_norm
