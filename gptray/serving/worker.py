"""The thread that steps an engine, and the streams through which an event loop gets what it makes.

What arrives and who leaves waits in two short lists that the thread empties between steps; what a
step made goes to the loop in one call. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field

from gptray.generation.engine import Engine, FinishReason, Generation, Request
from gptray.generation.sampling import Drawn

log = logging.getLogger("gptray")

# Nobody is told to come back later than this.
LONGEST_WAIT_S = 60


class Overloaded(RuntimeError):
    """The line is full. retry_after_s: when there is likely to be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class EngineStopped(RuntimeError):
    """The engine's thread was closed, or died of the exception that this one comes from."""


@dataclass(frozen=True)
class Update:
    """What is new of one request.

    index: its place among those of the stream. text: whole characters only, and nothing that may
    yet belong to a stop string; without `Request.live_text` all of it comes at the end. prompt:
    once, in the first update. end: the end-of-text token, if that ended it.
    """

    index: int
    text: str
    drawn: tuple[Drawn, ...]
    prompt: tuple[Drawn, ...]
    end: Drawn | None
    finish_reason: FinishReason | None


class EngineThread:
    """Runs an engine for any number of streams at a time.

    At most `max_waiting` requests wait for a slot. An exception in a step ends the thread and all
    streams. Counts `steps`, `rows` (sequences that drew a token, over all steps), `tokens` (those
    given out), `ended` (requests) and `seconds` (of all steps).
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.steps = self.rows = self.tokens = self.ended = 0
        self.seconds = 0.0
        self._engine = engine
        self._places = engine.max_batch_size + max_waiting
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards what follows, and wakes the thread when there is something new.
        self._news = threading.Condition()
        self._unfinished: set[_Order] = set()
        self._arrived: list[_Order] = []
        self._left: list[_Order] = []
        self._stopping = False
        self._error: Exception | None = None  # that ended the thread

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the step that runs, and wait for that; open streams raise EngineStopped."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return max(0, len(self._unfinished) - self.running)

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[Update, None]:
        """Run requests side by side; yield what each step makes of each.

        Leaving early cancels what has not ended: the slots are free before the next step but one.

        Raises, before any update: ValueError, a request can never run; Overloaded, there is no
        room for all of them. At any moment: EngineStopped.
        """
        for request in requests:
            self._engine.check(request)
        stream = _Stream()
        orders = [_Order(request, index, stream) for index, request in enumerate(requests)]
        self._accept(orders)
        try:
            unfinished = len(orders)
            while unfinished:
                news = await stream.news.get()
                if isinstance(news, EngineStopped):
                    raise news
                unfinished -= news.finish_reason is not None
                yield news
        finally:
            self._leave(orders)

    def _accept(self, orders: Sequence[_Order]) -> None:
        """Give all of them a place, or none."""
        if len(orders) > self._places:
            raise ValueError(f"{len(orders)} outputs at once, and there is room for {self._places}")
        with self._news:
            if not self.alive:
                raise EngineStopped("the engine has stopped") from self._error
            missing = len(self._unfinished) + len(orders) - self._places
            if missing > 0:
                seconds = math.ceil(missing * self.seconds / max(self.ended, 1))
                raise Overloaded(min(max(seconds, 1), LONGEST_WAIT_S))
            self._unfinished.update(orders)
            self._arrived += orders
            self._news.notify()

    def _leave(self, orders: Iterable[_Order]) -> None:
        with self._news:
            self._left += self._unfinished.intersection(orders)
            self._news.notify()

    def _run(self) -> None:
        try:
            orders: dict[Generation, _Order] = {}
            while self._take_news(orders):
                begin = time.perf_counter()
                touched = self._engine.step()
                self.seconds += time.perf_counter() - begin
                self._hand_out([orders[generation] for generation in touched])
                for generation in touched:
                    if generation.finish_reason is not None:
                        del orders[generation]
        except Exception as caught:
            log.exception("the engine has stopped")
            self._error = caught
        with self._news:
            self._stopping = True
            streams = {order.stream for order in self._unfinished}
        for stream in streams:
            stopped = EngineStopped("the engine has stopped")
            stopped.__cause__ = self._error
            _send(stream.loop, [(stream, stopped)])

    def _take_news(self, orders: dict[Generation, _Order]) -> bool:
        """Wait until there is something to do, and tell the engine. False: it is to stop."""
        with self._news:
            while not (self._arrived or self._left or self._engine.busy or self._stopping):
                self._news.wait()
            arrived, self._arrived = self._arrived, []
            left, self._left = self._left, []
            self._unfinished.difference_update(left)
            if self._stopping:
                return False
        for order in arrived:
            order.generation = self._engine.submit(order.request)
            orders[order.generation] = order
        for order in left:
            if order.generation is not None and order.generation in orders:
                del orders[order.generation]
                self._engine.cancel(order.generation)
        return True

    def _hand_out(self, orders: Sequence[_Order]) -> None:
        """Send each of them what is new of it."""
        updates = [order.update() for order in orders]
        self.steps += 1
        self.rows += len(orders)
        self.tokens += sum(len(update.drawn) for update in updates)
        ended = [o for o, update in zip(orders, updates, strict=True) if update.finish_reason]
        self.ended += len(ended)
        with self._news:
            self._unfinished.difference_update(ended)
        by_loop = defaultdict(list)
        for order, update in zip(orders, updates, strict=True):
            by_loop[order.stream.loop].append((order.stream, update))
        for loop, news in by_loop.items():
            _send(loop, news)


@dataclass(eq=False)
class _Stream:
    """Where an event loop waits for news of its requests."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    news: asyncio.Queue[Update | EngineStopped] = field(default_factory=asyncio.Queue)


@dataclass(eq=False)
class _Order:
    """A request on its way through the thread, and how much of its output was handed out."""

    request: Request
    index: int
    stream: _Stream
    generation: Generation | None = None
    tokens: int = 0
    characters: int = 0

    def update(self) -> Update:
        """What is new since the last call; each step brings a token or the end."""
        generation = self.generation
        assert generation is not None
        update = Update(
            self.index,
            generation.text[self.characters :],
            tuple(generation.drawn[self.tokens :]),
            () if self.tokens else tuple(generation.prompt),
            generation.end,
            generation.finish_reason,
        )
        self.tokens += len(update.drawn)
        self.characters += len(update.text)
        return update


def _send(
    loop: asyncio.AbstractEventLoop, news: Sequence[tuple[_Stream, Update | EngineStopped]]
) -> None:
    def put() -> None:
        for stream, item in news:
            stream.news.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        if not loop.is_closed():  # then nobody listens any more
            raise
