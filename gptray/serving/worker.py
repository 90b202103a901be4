"""The thread that steps an engine, and the streams through which an event loop gets what it makes.

What arrives and who leaves waits in two short lists that the thread empties between steps; what a
step made goes to the loop in one call. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from gptray.generation.engine import Engine
from gptray.generation.request import FinishReason, Generation, Request
from gptray.generation.sampling import Drawn

log = logging.getLogger("gptray")

# Nobody is told to come back later than this.
LONGEST_WAIT_S = 60
# An update of live text costs about 2 ms of a core until a client behind Ray Serve has it, as much
# as a token in a full batch. So there are no more than so many a second, of all requests together:
# a twentieth of the machine. With many requests several tokens go in one.
LIVE_UPDATES_PER_S = 25 * (os.cpu_count() or 1)


class Overloaded(RuntimeError):
    """The line is full. retry_after_s: when there is likely to be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


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
        self._told = 0.0  # when live text went out
        self._promised = 0.0  # until when room is promised to those turned away
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
        """Run requests side by side; yield what steps make of each, as fast as it is taken.

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
                for update in await stream.take():
                    unfinished -= update.finish_reason is not None
                    yield update
        finally:
            self._leave(orders)

    def _accept(self, orders: Sequence[_Order]) -> None:
        """Give all of them a place, or none."""
        if len(orders) > self._places:
            raise ValueError(f"{len(orders)} outputs at once, and there is room for {self._places}")
        with self._news:
            if not self.alive:
                raise self._stopped()
            missing = len(self._unfinished) + len(orders) - self._places
            if missing > 0:
                raise Overloaded(self._retry_after(missing, len(orders)))
            self._unfinished.update(orders)
            self._arrived += orders
            self._news.notify()

    def _retry_after(self, missing: int, outputs: int) -> int:
        """Seconds until there is room for these outputs and for those turned away before them.

        So they do not all come back at once, only to be turned away again.
        """
        each, now = self.seconds / max(self.ended, 1), time.monotonic()
        room = max(self._promised, now + (missing - outputs) * each) + outputs * each
        self._promised = min(room, now + LONGEST_WAIT_S)
        return max(math.ceil(self._promised - now), 1)

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
            self._unfinished.clear()
        _tell([(stream, self._stopped()) for stream in streams])

    def _stopped(self) -> EngineStopped:
        stopped = EngineStopped("the engine has stopped")
        stopped.__cause__ = self._error
        return stopped

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
        """Tell the streams of those that got a token or ended what is new of them."""
        now = time.perf_counter()
        # All at once: whoever stands between engine and clients is then woken once, and the steps
        # until the next time run undisturbed.
        live = sum(order.request.live_text for order in orders)
        is_time = now - self._told >= live / LIVE_UPDATES_PER_S
        if is_time:
            self._told = now
        due = [order for order in orders if order.is_due(is_time)]
        updates = [order.update() for order in due]
        ended = [order for order in due if order.has_ended]
        self.steps += 1
        self.rows += len(orders)
        self.tokens += sum(len(update.drawn) for update in updates)
        self.ended += len(ended)
        with self._news:
            self._unfinished.difference_update(ended)
        _tell([(order.stream, update) for order, update in zip(due, updates, strict=True)])


class _Stream:
    """Where an event loop waits for news of its requests; used by that loop alone."""

    def __init__(self) -> None:
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
class _Order:
    """A request on its way through the thread, and how much of its output was handed out."""

    request: Request
    index: int
    stream: _Stream
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


def _tell(news: Iterable[tuple[_Stream, Update | EngineStopped]]) -> None:
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


def _put(items: Iterable[tuple[_Stream, Update | EngineStopped]]) -> None:
    for stream, item in items:
        stream.put(item)
