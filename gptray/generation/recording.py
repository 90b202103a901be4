"""Records work as CUDA graphs, and moves what they read and return between host and device.

On a CPU the same code simply runs, so tests do not need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_one_at_a_time = Lock()


class Graphs:
    """Records functions without arguments as CUDA graphs that share memory for temporaries.

    A function may read and write tensors that outlive it. It must not wait for the device, and
    must do the same every time it runs. Its result is valid until it, or one recorded before it,
    runs again. On a CPU it is simply called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def recorded(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a function now; returns one that replays it and returns the same tensor."""
        if self._device.type != "cuda":
            return body
        return _Graph(body, self._device, self._pool)


class _Graph:
    """A recorded function. It holds no reference to the function, nor to what that refers to."""

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        # Once outside a graph first: libraries set up their state at their first call.
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            body()
        now.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local, as other threads of the process may use the GPU meanwhile, but only one may
        # record: a new model opens while the old one answers. If recording fails, the stream's
        # context brings this thread back to its stream.
        recording = torch.cuda.graph(self._graph, pool, capture_error_mode="thread_local")
        with _one_at_a_time, torch.cuda.stream(now), recording:
            self._result = body()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._result


class Mirror:
    """Integers that the host writes to `numbers` and a graph reads from `sent`, (F, N) int64.

    Floats travel as their bits. numbers: (pages, F, N), so that the host can write one page while
    the device reads another.
    """

    def __init__(self, fields: int, count: int, device: torch.device, *, pages: int = 1) -> None:
        is_cuda = device.type == "cuda"
        # Pinned, or the host would wait in a copy for all work before it.
        self._host = torch.zeros(pages, fields, count, dtype=torch.int64, pin_memory=is_cuda)
        self.numbers: NDArray[np.int64] = self._host.numpy()
        self.sent = torch.zeros(fields, count, dtype=torch.int64, device=device)
        self._read = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until the device has read what was sent last, so that it may be overwritten."""
        if self._read is not None:
            self._read.synchronize()

    def send(self, page: int = 0) -> None:
        """Copy a page to the device, in the stream's order."""
        self.sent.copy_(self._host[page], non_blocking=True)
        if self._read is not None:
            self._read.record()


class Inbox:
    """Copies a graph's result (N,) int64 to the host while later work runs."""

    def __init__(self, count: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=is_cuda)
        self._arrived = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def expect(self, result: Tensor) -> None:
        """Start copying a result."""
        self._host.copy_(result, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def take(self) -> list[int]:
        """Wait for the result and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
