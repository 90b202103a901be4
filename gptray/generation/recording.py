"""Work for a GPU that is recorded once as a CUDA graph, and the tensors it reads and returns.

On a CPU the same code simply runs, so tests do not need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Graphs:
    """Records functions of no arguments as CUDA graphs that share memory for what lies between.

    A function may read and write tensors that outlive it, must not wait for the device, and must do
    the same if it runs twice. Its result holds until it, or one recorded before it, runs again. On
    a CPU it is simply called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def recorded(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The same function, as a graph that is recorded now."""
        if self._device.type != "cuda":
            return body
        return _Graph(body, self._device, self._pool)


class _Graph:
    """What a function does. It does not keep the function, and so what that refers to."""

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        # Outside of a graph first: libraries prepare what they keep at their first call.
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            body()
        now.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile. Where recording fails, it is the
        # first context that takes this thread back to its stream.
        recording = torch.cuda.graph(self._graph, pool, capture_error_mode="thread_local")
        with torch.cuda.stream(now), recording:
            self._result = body()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._result


class Mirror:
    """Whole numbers that the host writes to `numbers` and a graph reads from `sent`, (F, N) int64.

    Reals go as their bits. numbers: (pages, F, N), so that the host can write one page after the
    other while the device reads.
    """

    def __init__(self, fields: int, count: int, device: torch.device, *, pages: int = 1) -> None:
        is_cuda = device.type == "cuda"
        # Pinned: else a copy would wait for all work before it.
        self._host = torch.zeros(pages, fields, count, dtype=torch.int64, pin_memory=is_cuda)
        self.numbers: NDArray[np.int64] = self._host.numpy()
        self.sent = torch.zeros(fields, count, dtype=torch.int64, device=device)
        self._read = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until what was sent last has been read: then it may be overwritten."""
        if self._read is not None:
            self._read.synchronize()

    def send(self, page: int = 0) -> None:
        """Copy the numbers of a page in the stream's order."""
        self.sent.copy_(self._host[page], non_blocking=True)
        if self._read is not None:
            self._read.record()


class Inbox:
    """Takes a graph's result to the host, (N,) int64, while later work runs."""

    def __init__(self, count: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=is_cuda)
        self._come = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def expect(self, result: Tensor) -> None:
        """Begin to copy a result."""
        self._host.copy_(result, non_blocking=True)
        if self._come is not None:
            self._come.record()

    def take(self) -> list[int]:
        """Wait for the result."""
        if self._come is not None:
            self._come.synchronize()
        return self._host.tolist()
