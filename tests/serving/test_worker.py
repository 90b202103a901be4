"""The engine's thread with a real engine: streams, leaving, overload and death."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.generation.sampling import Drawn
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.serving.engine_thread import EngineThread, Overloaded
from gptray.serving.streams import EngineStopped, Update
from tests.generation.models import random_gpt, run, small_tokenizer

# A request that does not end before it is left.
LONG = Sequence([1, 2], Sampling(max_new_tokens=250, min_new_tokens=250))
SHORT = Sequence([3], Sampling(max_new_tokens=1, temperature=0))
HANGS_S = 20.0


class GatedEngine(Engine):
    """An engine that makes a step when it is told to; `opened` tells it for good."""

    def __init__(self, tokenizer: Tokenizer, slots: int, *, fails: bool = False) -> None:
        model = random_gpt(tokenizer, n_positions=256)
        if fails:  # no position can be looked up
            model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:0]
        super().__init__(model, tokenizer, max_batch_size=slots)
        self._allowed = threading.Semaphore(0)
        self._open = False

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def open(self) -> None:
        self._open = True
        self.allow(1)

    def step(self) -> list[Sequence]:
        if not self._open:
            self._allowed.acquire()
        return super().step()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@contextmanager
def started(engine: Engine, *, max_waiting: int = 100) -> Iterator[EngineThread]:
    worker = EngineThread(engine, max_waiting=max_waiting)
    try:
        yield worker
    finally:
        if isinstance(engine, GatedEngine):
            engine.open()
        worker.close()


async def collect(worker: EngineThread, requests: list[Sequence]) -> list[list[Update]]:
    """Every request's updates."""
    updates: list[list[Update]] = [[] for _ in requests]
    async with asyncio.timeout(HANGS_S):
        async for update in worker.stream([replace(request) for request in requests]):
            updates[update.index].append(update)
    return updates


async def accepted(worker: EngineThread, *requests: Sequence) -> asyncio.Task[list[list[Update]]]:
    """A task that collects; its requests are in the line."""
    before = worker.waiting
    task = asyncio.create_task(collect(worker, list(requests)))
    await asyncio.sleep(0)
    assert worker.waiting == before + len(requests)
    return task


def assert_same(ours: list[Drawn], theirs: list[Drawn]) -> None:
    """The same tokens; their log-probabilities as near as PyTorch comes in another batch."""
    assert [drawn.token for drawn in ours] == [drawn.token for drawn in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert [token for token, _ in mine.top] == [token for token, _ in other.top]
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [p for _, p in mine.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


def test_streams_give_what_the_engine_gives(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer)
    requests = [
        Sequence(
            [1 + i, 2, 3],
            Sampling(max_new_tokens=6 * i + 1, temperature=1.5, seed=i, logprobs=2, stop=("t",)),
            live_text=i % 2 == 0,
            prompt_logprobs=1 if i % 3 == 0 else None,
        )
        for i in range(9)
    ]
    expected = run(Engine(model, tokenizer), requests)

    async def both(worker: EngineThread) -> list[list[Update]]:
        first, second = await asyncio.gather(
            collect(worker, requests[:2]), collect(worker, requests[2:])
        )
        return first + second

    with started(Engine(model, tokenizer, max_batch_size=4)) as worker:
        streamed = asyncio.run(both(worker))
        asyncio.run(both(worker))  # another event loop
    for updates, generation in zip(streamed, expected, strict=True):
        assert_same([drawn for update in updates for drawn in update.drawn], generation.drawn)
        assert "".join(update.text for update in updates) == generation.text
        assert_same([drawn for update in updates for drawn in update.prompt], generation.scored)
        ends = updates[-1].end, generation.end
        assert_same(*([end] if end else [] for end in ends))
        assert [u.finish_reason for u in updates[:-1]] == [None] * (len(updates) - 1)
        assert updates[-1].finish_reason == generation.finish_reason
    assert worker.tokens == 2 * sum(len(generation.drawn) for generation in expected)
    assert worker.ended == 2 * len(requests) and worker.rows <= 4 * worker.steps
    assert {g.finish_reason for g in expected} == {"stop", "length"}


def test_live_text_comes_as_it_is_made_other_text_at_the_end(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, n_positions=256)
    sampling = Sampling(max_new_tokens=250, min_new_tokens=250)
    requests = [Sequence([5, 6], sampling, live_text=live) for live in (True, False)]
    with started(Engine(model, tokenizer)) as worker:
        live, other = asyncio.run(collect(worker, requests))
    assert len(live) > 2 and len(live[0].drawn) == 1
    assert [(len(update.drawn), bool(update.text)) for update in other] == [(1, False), (249, True)]
    assert "".join(update.text for update in live) == other[1].text


def test_who_is_slow_gets_several_tokens_at_once(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1)
    request = Sequence([5, 6], Sampling(max_new_tokens=60, logprobs=0), live_text=True)
    (expected,) = run(Engine(random_gpt(tokenizer, n_positions=256), tokenizer), [request])

    async def dawdle(worker: EngineThread) -> list[Update]:
        stream = worker.stream([request])
        engine.allow(1)
        updates = [await anext(stream)]
        engine.open()
        while not worker.ended:
            await asyncio.sleep(0)
        return updates + [update async for update in stream]

    with started(engine) as worker:
        updates = asyncio.run(dawdle(worker))
    assert len(updates) <= 3
    assert [drawn for update in updates for drawn in update.drawn] == expected.drawn
    assert "".join(update.text for update in updates) == expected.text
    assert updates[-1].finish_reason == expected.finish_reason


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_who_leaves_frees_the_slot_before_the_next_step_but_one(
    tokenizer: Tokenizer, how: str
) -> None:
    engine = GatedEngine(tokenizer, slots=1)

    async def leave(worker: EngineThread) -> None:
        stream = worker.stream([replace(LONG)])
        engine.allow(1)
        await anext(stream)
        # The thread is about to make its second step: the third is another's.
        if how == "closed":
            await stream.aclose()
        else:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        engine.allow(2)
        (updates,) = await collect(worker, [SHORT])
        assert [update.finish_reason for update in updates] == ["length"]

    with started(engine, max_waiting=1) as worker:
        asyncio.run(leave(worker))
        assert worker.steps <= 3 and not engine.busy


def test_a_loop_that_ends_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1)
    kept = []

    async def abandon(worker: EngineThread) -> None:
        kept.append(worker.stream([replace(LONG), replace(LONG)]))
        engine.allow(1)
        await anext(kept[0])

    with started(engine) as worker:
        asyncio.run(abandon(worker))
        engine.open()
        asyncio.run(collect(worker, [SHORT]))
        assert worker.running == worker.waiting == 0
        assert worker.steps <= 4


def test_only_a_full_line_turns_away_and_others_find_room_beside_many(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=2)

    async def fill(worker: EngineThread) -> None:
        many = await accepted(worker, *[SHORT] * 20)  # takes no more than three of the six places
        more = await accepted(worker, *[SHORT] * 20)  # and these one of their own
        others = [await accepted(worker, SHORT, SHORT)]
        with pytest.raises(Overloaded) as refused:
            await collect(worker, [SHORT])
        assert refused.value.retry_after_s >= 1
        engine.open()
        for task in (many, more, *others):
            assert [updates[-1].finish_reason for updates in await task] == ["length"] * len(
                task.result()
            )

    with started(engine, max_waiting=4) as worker:
        asyncio.run(fill(worker))
        assert worker.ended == 42 and worker.waiting == 0


def test_a_stream_of_many_has_as_many_under_way_as_it_asks_for(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=4)
    model = random_gpt(tokenizer, n_positions=256)
    requests = [Sequence([1 + i], Sampling(max_new_tokens=3, seed=i)) for i in range(9)]
    expected = run(Engine(model, tokenizer), requests)

    async def two_at_a_time(worker: EngineThread) -> list[str]:
        texts = [""] * len(requests)
        with worker.accept(requests, at_once=2) as taken:
            assert worker.waiting == len(requests)
            engine.open()
            async for update in taken.updates():
                texts[update.index] += update.text
        return texts

    with started(engine) as worker:
        assert asyncio.run(two_at_a_time(worker)) == [done.text for done in expected]
        assert worker.rows <= 2 * worker.steps


def test_those_turned_away_are_told_to_come_back_one_after_the_other(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1)

    async def turn_away(worker: EngineThread) -> None:
        engine.allow(2)
        await collect(worker, [SHORT, SHORT])  # so long does one take
        tasks = [await accepted(worker, SHORT) for _ in range(2)]
        told: list[int] = []
        while not told or told[-1] < 3:
            with pytest.raises(Overloaded) as refused:
                await collect(worker, [SHORT])
            told.append(refused.value.retry_after_s)
        assert told[0] == 1
        engine.open()
        await asyncio.gather(*tasks)

    with started(engine, max_waiting=1) as worker:
        asyncio.run(turn_away(worker))


def test_who_leaves_frees_a_place_as_well(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1)

    async def leave(worker: EngineThread) -> None:
        for _ in range(9):
            stream = worker.stream([replace(LONG)])
            engine.allow(2)
            await anext(stream)
            await stream.aclose()
        engine.allow(2)
        await collect(worker, [SHORT])
        worker.seconds = 20.0  # of ten sequences
        tasks = [await accepted(worker, SHORT) for _ in range(3)]
        with pytest.raises(Overloaded) as refused:
            await collect(worker, [SHORT])
        assert refused.value.retry_after_s == 2
        engine.open()
        await asyncio.gather(*tasks)

    with started(engine, max_waiting=2) as worker:
        asyncio.run(leave(worker))
        assert worker.ended == 13


def test_what_can_never_run_is_refused_and_leaves_no_trace(tokenizer: Tokenizer) -> None:
    with started(Engine(random_gpt(tokenizer), tokenizer), max_waiting=3) as worker:
        with pytest.raises(ValueError, match="outside"):
            asyncio.run(collect(worker, [SHORT, Sequence([10**6])]))
        assert worker.waiting == 0 and worker.alive
        asyncio.run(collect(worker, [SHORT]))
        assert worker.ended == 1


def test_an_engine_that_fails_ends_every_stream_and_takes_no_more(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1, fails=True)

    async def fail(worker: EngineThread) -> None:
        running, waiting = await accepted(worker, SHORT), await accepted(worker, LONG, SHORT)
        engine.open()
        for task in (running, waiting, asyncio.create_task(collect(worker, [SHORT]))):
            with pytest.raises(EngineStopped) as stopped:
                await task
            assert "self indexing axis" in str(stopped.value.__cause__)

    with started(engine) as worker:
        assert worker.alive
        asyncio.run(fail(worker))
        assert not worker.alive


def test_memory_that_ends_names_the_key_to_lower(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0.")

    async def fail(worker: EngineThread) -> None:
        with pytest.raises(EngineStopped):
            await collect(worker, [SHORT])

    monkeypatch.setattr(torch, "softmax", ended)
    with started(Engine(random_gpt(tokenizer), tokenizer, max_batch_size=4)) as worker:
        asyncio.run(fail(worker))
    assert "lower serve.max_batch_size from 4, such as" in str(worker.error)


def test_closing_ends_open_streams(tokenizer: Tokenizer) -> None:
    engine = GatedEngine(tokenizer, slots=1)

    async def close(worker: EngineThread) -> None:
        tasks = [await accepted(worker, LONG), await accepted(worker, SHORT)]
        engine.allow(1)
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        while worker.alive:
            await asyncio.sleep(0)
        engine.open()
        await closing
        for task in tasks:
            with pytest.raises(EngineStopped):
                await task

    worker = EngineThread(engine, max_waiting=5)
    asyncio.run(close(worker))
    assert not worker.alive
