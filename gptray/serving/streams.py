"""Carries sequences' updates from the engine's thread to the event loops that wait for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, replace

from gptray.generation.sampling import Drawn
from gptray.generation.sequence import FinishReason, Sequence


class EngineStopped(RuntimeError):
    """The engine's thread was closed, or died from the exception that caused this one."""


@dataclass(frozen=True)
class Update:
    """What is new in a sequence since the last update: one token or more.

    index: of the sequence in its stream. text: whole characters only, without the possible start of
    a stop string. prompt: only in the first update. end: the token that ended the sequence and is
    not part of it, if there is one. error: the reason, if finish_reason is "error". Without
    `Sequence.live_text` there are two updates: the first token, and the rest.
    """

    index: int
    text: str
    drawn: tuple[Drawn, ...]
    prompt: tuple[Drawn, ...]
    end: Drawn | None
    finish_reason: FinishReason | None
    error: str | None = None
    stop_reason: str | int | None = None

    def __add__(self, later: Update) -> Update:
        return replace(
            later,
            text=self.text + later.text,
            drawn=self.drawn + later.drawn,
            prompt=self.prompt + later.prompt,
        )


class Stream:
    """Where an event loop waits for its sequences' updates; only it calls `put` and `updates`.

    later: sequences not yet queued in the engine; under_way: those queued or running, at most
    `at_once`. The engine thread's lock guards both. unfinished: how many the loop has not seen end.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once, self.unfinished = at_once, 0
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

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield sequences' updates, merged if they are taken slowly. Raises EngineStopped."""
        while self.unfinished:
            await self._has_news.wait()
            self._has_news.clear()
            if self._stopped is not None:
                raise self._stopped
            updates, self._updates = self._updates, {}
            for update in updates.values():
                self.unfinished -= update.finish_reason is not None
                yield update


@dataclass(eq=False)
class Order:
    """A sequence for the engine's thread, and how much of its output has been sent."""

    sequence: Sequence
    index: int
    stream: Stream
    tokens: int = 0
    characters: int = 0

    def is_due(self, is_time: bool) -> bool:
        """Whether to send an update: the first token, the end and, when it is time, live text."""
        return (is_time and self.sequence.live_text) or not self.tokens or self.sequence.ended

    def update(self) -> Update:
        """What is new since the last call."""
        sequence = self.sequence
        update = Update(
            self.index,
            sequence.text[self.characters :],
            tuple(sequence.drawn[self.tokens :]),
            () if self.tokens else tuple(sequence.scored),
            sequence.end,
            sequence.finish_reason,
            sequence.error,
            sequence.stop_reason,
        )
        self.tokens += len(update.drawn)
        self.characters += len(update.text)
        return update


def deliver(news: Iterable[tuple[Stream, Update | EngineStopped]]) -> None:
    """Put updates into their streams, with one call for each event loop."""
    by_loop = defaultdict(list)
    for stream, item in news:
        by_loop[stream.loop].append((stream, item))
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, items)
        except RuntimeError:
            if not loop.is_closed():  # the server has stopped
                raise


def _put(items: Iterable[tuple[Stream, Update | EngineStopped]]) -> None:
    for stream, item in items:
        stream.put(item)
