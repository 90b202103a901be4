"""Shared by all parts of `gpu.py`: the device, the clock and the results."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class OutOfTime(Exception):
    """The run has used up its time."""


class Bench:
    """One run of the benchmark.

    tiny: use a dry run's shapes. scratch: a temporary folder. data: prepared text, if given.
    limit_s: when to end. `results` has every figure by name, `failures` the names of what failed.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        tiny: bool,
        scratch: Path,
        data: Path | None = None,
        out: Path | None = None,
        limit_s: float = math.inf,
    ) -> None:
        self.device, self.tiny, self.scratch, self.data = device, tiny, scratch, data
        self.on_gpu = device.type == "cuda"
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []
        self._out, self._limit_s = out, limit_s
        self._begin = time.perf_counter()

    def clock(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._begin

    def say(self, text: str) -> None:
        """Print a line. Raises OutOfTime if the time is up."""
        print(f"[{self.clock():5.0f}s] {text}", flush=True)
        if self.clock() >= self._limit_s:
            raise OutOfTime

    def keep(self, name: str, value: Any) -> None:
        """Record a figure, and write it to the file at once."""
        self.results[name] = value
        if self._out:
            self._out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def fail(self, name: str, error: Exception) -> None:
        """Print and record a failure."""
        self.failures.append(name)
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        self.keep(name, {"failed": reason})
        self.say(f"{name}: FAILED: {reason}")

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], *, warm: int = 3, times: int = 10) -> float:
        """Median seconds of a call, including its work on the GPU."""
        for _ in range(warm):
            call()
        self.wait()
        taken = []
        for _ in range(1 if self.tiny else times):
            begin = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def free(self) -> None:
        """Free unused memory, also on the GPU."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
