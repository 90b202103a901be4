"""The thread that steps an engine and passes its output to event loops.

New and cancelled sequences wait in two short lists that the thread empties between steps; a step's
output goes to an event loop in one call. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager

from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.model.gpu_faults import memory_told
from gptray.serving.streams import EngineStopped, Order, Stream, Update, deliver

log = logging.getLogger("gptray")

# The longest Retry-After.
LONGEST_WAIT_S = 60
# Delivering an update of live text to a client behind Ray Serve costs about 2 ms of a core, as much
# as a token in a full batch. So all requests together get at most this many a second, a twentieth
# of the machine; with many requests, an update has several tokens.
LIVE_UPDATES_PER_S = 25 * (os.cpu_count() or 1)


class Overloaded(RuntimeError):
    """The queue is full. retry_after_s: when there is likely to be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class EngineThread:
    """Runs an engine for any number of streams at a time.

    At most `max_waiting` sequences wait for a slot. A stream with many sequences has only some
    queued or running at a time, to leave room for other streams; when one ends, the next is queued.
    An exception in the engine ends the thread and all streams. Counts `steps`, `rows` (sequences
    that drew a token, summed over steps), `tokens` (passed on), `ended` (sequences) and `seconds`
    (of all steps). error: the exception that ended the thread, if one did; RunFailed names
    serve.max_batch_size where memory of a GPU ended.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.steps = self.rows = self.tokens = self.ended = 0
        self.seconds = 0.0
        self._engine = engine
        self._places = engine.max_batch_size + max_waiting
        # The most places that streams with more sequences than fit may take together.
        self._shared = max(engine.max_batch_size, self._places // 2)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards the fields below, and wakes the thread when there is something new.
        self._news = threading.Condition()
        self._unfinished: set[Order] = set()
        self._arrived: list[Order] = []
        self._left: list[Order] = []
        self._partial: deque[Stream] = deque()  # streams with sequences that have no place yet
        self._sent_live = 0.0  # when live text was last sent
        self._promised = 0.0  # the latest time at which refused requests were told to retry
        self._stopping = False
        self.error: Exception | None = None  # what ended the thread
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step, waiting for it; open streams raise EngineStopped."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread accepts sequences."""
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Sequences without a slot yet."""
        with self._news:
            later = sum(len(stream.later) for stream in self._partial)
            return max(0, len(self._unfinished) + later - self.running)

    @contextmanager
    def accept(
        self, sequences: Iterable[Sequence], *, at_once: int | None = None
    ) -> Iterator[Stream]:
        """Run sequences concurrently: all of them or, if they do not fit, some at a time.

        at_once: how many may be queued or running at a time. The stream belongs to the calling
        event loop; leaving the context cancels unfinished sequences, freeing their slots within two
        steps.

        Raises:
            ValueError: a sequence, not checked before, can never run.
            Overloaded: there is no room for any of them.
            EngineStopped: the engine's thread has ended.
        """
        stream = Stream(min(at_once or self._shared, self._shared))
        orders = [Order(sequence, index, stream) for index, sequence in enumerate(sequences)]
        for order in orders:
            if not order.sequence.is_checked:
                self._engine.check(order.sequence)
        stream.later.extend(orders)
        stream.unfinished = len(orders)
        with self._news:
            if not self.alive:
                raise self._stopped()
            if len(self._unfinished) >= self._places:
                raise Overloaded(self._retry_after())
            fits = len(orders) <= stream.at_once
            self._feed(stream, self._places if fits else self._shared)
            if not stream.under_way:
                self._begin_next(stream)
            if stream.later:
                self._partial.append(stream)
            self._news.notify()
        try:
            yield stream
        finally:
            with self._news:
                stream.later.clear()
                self._left += self._unfinished.intersection(stream.under_way)
                self._news.notify()

    async def stream(self, sequences: Iterable[Sequence]) -> AsyncGenerator[Update, None]:
        """Accept sequences and yield their updates. Raises like `accept` and `Stream.updates`."""
        with self.accept(sequences) as accepted:
            async for update in accepted.updates():
                yield update

    def _feed(self, stream: Stream, places: int) -> None:
        """Queue a stream's sequences while it may have more and fewer than `places` are taken."""
        while (
            stream.later
            and len(stream.under_way) < stream.at_once
            and len(self._unfinished) < places
        ):
            self._begin_next(stream)

    def _begin_next(self, stream: Stream) -> None:
        order = stream.later.popleft()
        stream.under_way.add(order)
        self._unfinished.add(order)
        self._arrived.append(order)

    def _retry_after(self) -> int:
        """Seconds until there is likely to be room for this request and all refused before it.

        Otherwise they would all come back at once, only to be refused again.
        """
        each, now = self.seconds / max(self.ended, 1), time.monotonic()
        self._promised = min(max(self._promised, now) + each, now + LONGEST_WAIT_S)
        return max(math.ceil(self._promised - now), 1)

    def _run(self) -> None:
        try:
            with memory_told("serve.max_batch_size", self._engine.max_batch_size):
                self._step_while_asked()
        except Exception as caught:
            log.exception("the engine has stopped")
            self.error = caught
        with self._news:
            self._stopping = True
            streams = {order.stream for order in self._unfinished}
            self._unfinished.clear()
            self._partial.clear()
        deliver([(stream, self._stopped()) for stream in streams])

    def _step_while_asked(self) -> None:
        orders: dict[Sequence, Order] = {}
        while self._take_news(orders):
            begin = time.perf_counter()
            touched = self._engine.step()
            self.seconds += time.perf_counter() - begin
            self._hand_out([orders[sequence] for sequence in touched])
            for sequence in touched:
                if sequence.ended:
                    del orders[sequence]

    def _stopped(self) -> EngineStopped:
        stopped = EngineStopped("the engine has stopped")
        stopped.__cause__ = self.error
        return stopped

    def _take_news(self, orders: dict[Sequence, Order]) -> bool:
        """Wait for something to do, and pass it to the engine. False: the thread is to stop."""
        with self._news:
            while not (self._arrived or self._left or self._engine.busy or self._stopping):
                self._news.wait()
            left, self._left = self._left, []
            self.ended += len(self._unfinished.intersection(left))
            self._unfinished.difference_update(left)
            self._share_room()
            arrived, self._arrived = self._arrived, []
            if self._stopping:
                return False
        for order in arrived:
            orders[self._engine.submit(order.sequence)] = order
        for order in left:
            if orders.pop(order.sequence, None):
                self._engine.cancel(order.sequence)
        return True

    def _share_room(self) -> None:
        """Queue more sequences of the streams that wait for room, in turn."""
        for _ in range(len(self._partial)):
            stream = self._partial.popleft()
            self._feed(stream, self._shared)
            if stream.later:
                self._partial.append(stream)

    def _hand_out(self, orders: list[Order]) -> None:
        """Send updates of sequences that got a token or ended to their streams."""
        now = time.perf_counter()
        # Send all live text at once: everything between engine and clients then wakes once, and
        # the steps until the next time run undisturbed.
        live = sum(order.sequence.live_text for order in orders)
        is_time = now - self._sent_live >= live / LIVE_UPDATES_PER_S
        if is_time:
            self._sent_live = now
        due = [order for order in orders if order.is_due(is_time)]
        updates = [order.update() for order in due]
        ended = [order for order in due if order.sequence.ended]
        self.steps += 1
        self.rows += len(orders)
        self.tokens += sum(len(update.drawn) for update in updates)
        self.ended += len(ended)
        with self._news:
            self._unfinished.difference_update(ended)
            for order in ended:
                order.stream.under_way.discard(order)
                if order.stream.later:
                    self._begin_next(order.stream)
        deliver([(order.stream, update) for order, update in zip(due, updates, strict=True)])
