"""What is new of requests, on its way from the engine's thread to the event loops that wait."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from gptray.generation.request import FinishReason, Generation, Request
from gptray.generation.sampling import Drawn


class EngineStopped(RuntimeError):
    """The engine's thread was closed, or died of the exception that this one comes from."""


@dataclass(frozen=True)
class Update:
    """What is new of one request since the last update, of one token or more.

    index: its place among those of the stream. text: whole characters only, and nothing that may
    yet belong to a stop string. prompt: once, in the first update. end: the end-of-text token, if
    that ended it. error: why, where finish_reason is "error". Without `Request.live_text` there are
    two: the first token, and the rest.
    """

    index: int
    text: str
    drawn: tuple[Drawn, ...]
    prompt: tuple[Drawn, ...]
    end: Drawn | None
    finish_reason: FinishReason | None
    error: str | None = None

    def __add__(self, later: Update) -> Update:
        return Update(
            self.index,
            self.text + later.text,
            self.drawn + later.drawn,
            self.prompt + later.prompt,
            later.end,
            later.finish_reason,
            later.error,
        )


class Stream:
    """Where an event loop waits for news of its requests; `put` and `take` are that loop's alone.

    later: requests that have no place yet; under_way: those that have one, at most `at_once`. Both
    are guarded by the thread's lock.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.later: deque[Order] = deque()
        self.under_way: set[Order] = set()
        self.loop = asyncio.get_running_loop()
        self._updates: dict[int, Update] = {}
        self._stopped: EngineStopped | None = None
        self._has_news = asyncio.Event()

    def put(self, news: Update | EngineStopped) -> None:
        if isinstance(news, EngineStopped):
            self._stopped = news
        elif news.index in self._updates:
            self._updates[news.index] += news
        else:
            self._updates[news.index] = news
        self._has_news.set()

    async def take(self) -> Iterable[Update]:
        """Wait for news: one update of each request that has any. Raises EngineStopped."""
        await self._has_news.wait()
        self._has_news.clear()
        if self._stopped is not None:
            raise self._stopped
        updates, self._updates = self._updates, {}
        return updates.values()


@dataclass(eq=False)
class Order:
    """A request on its way through the thread, and how much of its output was handed out."""

    request: Request
    index: int
    stream: Stream
    generation: Generation | None = None
    tokens: int = 0
    characters: int = 0

    @property
    def has_ended(self) -> bool:
        return self._made.finish_reason is not None

    def is_due(self, is_time: bool) -> bool:
        """Whether to tell: the first token, the end, and live text when it is time for that."""
        return (is_time and self.request.live_text) or not self.tokens or self.has_ended

    def update(self) -> Update:
        """What is new since the last call."""
        made = self._made
        update = Update(
            self.index,
            made.text[self.characters :],
            tuple(made.drawn[self.tokens :]),
            () if self.tokens else tuple(made.prompt),
            made.end,
            made.finish_reason,
            made.error,
        )
        self.tokens += len(update.drawn)
        self.characters += len(update.text)
        return update

    @property
    def _made(self) -> Generation:
        assert self.generation is not None
        return self.generation


def tell(news: Iterable[tuple[Stream, Update | EngineStopped]]) -> None:
    """Put news into their streams, each event loop's in one call."""
    by_loop = defaultdict(list)
    for stream, item in news:
        by_loop[stream.loop].append((stream, item))
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, items)
        except RuntimeError:
            if not loop.is_closed():  # then nobody listens any more
                raise


def _put(items: Iterable[tuple[Stream, Update | EngineStopped]]) -> None:
    for stream, item in items:
        stream.put(item)
