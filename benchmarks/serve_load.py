"""Clients of a completions server, each with one request at a time, and the latencies they measure.

Raw asyncio streams, since clients take CPU time from the server. Measuring starts after a warm-up
and covers a fixed window; a request that overlaps either end counts for the part inside. A refused
client retries after the seconds that Retry-After names.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Shortest and longest prompt and output; uniform in between.
PROMPT_TOKENS, NEW_TOKENS = (16, 128), (16, 128)
VOCABULARY, TOP_K = 50_000, 50
WARM_UP_S = 5.0

_RETRY_AFTER = re.compile(rb"(?i)\r\nretry-after: *([0-9]+)\r\n")
_COUNT = re.compile(rb'"completion_tokens":\s*([0-9]+)')


@dataclass
class Ask:
    """One completion request."""

    prompt: list[int]
    new_tokens: int
    seed: int


def asks() -> Iterator[Ask]:
    """An endless sequence of requests, the same for every call."""
    rng = np.random.default_rng(0)
    for seed in itertools.count():
        length, new_tokens = (int(rng.integers(a, b + 1)) for a, b in (PROMPT_TOKENS, NEW_TOKENS))
        yield Ask(rng.integers(VOCABULARY, size=length).tolist(), new_tokens, seed)


@dataclass
class Answer:
    """The tokens of a request so far and their times."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    ended: bool = False


class Window:
    """The measured span of time and the answers that fall into it."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.perf_counter() + WARM_UP_S
        self.end = self.begin + seconds
        self._answers: list[Answer] = []
        self._tokens = self._refused = 0

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self.end - time.perf_counter())

    def new_answer(self) -> Answer:
        self._answers.append(Answer())
        return self._answers[-1]

    def refused(self, answer: Answer) -> None:
        """Drop the answer and count a refusal."""
        self._answers.remove(answer)
        self._refused += self.begin <= time.perf_counter() < self.end

    def got(self, answer: Answer, tokens: int, *, ended: bool) -> None:
        """Record that an answer now has this many tokens."""
        now = time.perf_counter()
        if self.begin <= now < self.end:
            self._tokens += tokens - answer.tokens
        if tokens and answer.first is None:
            answer.first = now
        answer.tokens, answer.last, answer.ended = tokens, now, ended

    def report(self) -> dict[str, Any]:
        """Rates, and the median and 99th percentile of latencies in seconds."""
        seconds = self.end - self.begin
        ended = [a for a in self._answers if a.ended and self.begin <= a.last < self.end]
        # A client still waiting for its first token has waited at least until the end.
        firsts = [(a.first or self.end, a.began) for a in self._answers if a.began < self.end]
        waits = [min(first, self.end) - began for first, began in firsts if first >= self.begin]
        steps = [(a.last - (a.first or 0)) / (a.tokens - 1) for a in ended if a.tokens > 1]
        return {
            "requests_per_sec": round(len(ended) / seconds, 3),
            "refused_per_sec": round(self._refused / seconds, 3),
            "tokens_per_sec": round(self._tokens / seconds, 1),
            "first_token_s": _quantiles(waits),
            "per_token_s": _quantiles(steps),
        }


def _quantiles(values: list[float]) -> dict[str, float | None]:
    return {
        name: round(float(np.quantile(values, q)), 4) if values else None
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }


def load(port: int, clients: int, seconds: float, names: Sequence[str] = ()) -> dict[str, Any]:
    """Report on a server under the load of this many clients for one window.

    names: a model for each client; by default, requests name none.
    """
    return asyncio.run(_load(port, clients, seconds, names))


async def _load(port: int, clients: int, seconds: float, names: Sequence[str]) -> dict[str, Any]:
    window, requests = Window(seconds), asks()

    async def client(name: str | None) -> None:
        for ask in requests:
            while wait := await _complete(port, ask, window, name):
                await asyncio.sleep(wait)

    own = names or itertools.repeat(None, clients)
    tasks = [asyncio.create_task(client(name)) for name in own]
    await asyncio.wait(tasks, timeout=window.left, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Work left over from disconnected clients must not slow the next measurement.
    while wait := await _complete(port, Ask([1], 1, 0), window):
        await asyncio.sleep(wait)
    return window.report()


async def _complete(port: int, ask: Ask, window: Window, name: str | None = None) -> int:
    """Stream one completion; return 0, or the seconds to wait if it was refused.

    name: of a served model. Raises RuntimeError for any other error or a truncated answer.
    """
    body = json.dumps(
        {
            "model": name,
            "prompt": ask.prompt,
            "max_tokens": ask.new_tokens,
            "seed": ask.seed,
            "top_k": TOP_K,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = window.new_answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 429 " in status and (wait := _RETRY_AFTER.search(await reader.read())):
            window.refused(answer)
            return int(wait[1])
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r} {await reader.read(2000)!r}")
        async for line in reader:
            if line.startswith(b"data:") and (counted := _COUNT.search(line)):
                tokens = int(counted[1])
                if tokens > answer.tokens:
                    window.got(answer, tokens, ended=tokens == ask.new_tokens)
        if not answer.ended:
            raise RuntimeError(f"got only {answer.tokens} of {ask.new_tokens} tokens")
        return 0
    finally:
        writer.close()
