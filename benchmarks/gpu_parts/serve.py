"""The engine thread with many streams in one event loop."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from gpu_parts.bench import Bench
from gpu_parts.generate import PROMPT_TOKENS, TOP_K, engine_of, model_folder

from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.serving.engine_thread import EngineThread


def serve(bench: Bench) -> None:
    levels = (1, 8) if bench.tiny else (1, 32, 64)
    new_tokens = 8 if bench.tiny else 64
    engine = engine_of(bench, model_folder(bench), max(levels), precision="bf16")
    thread = EngineThread(engine, max_waiting=256)
    try:
        for streams in levels:
            for live in (False, True):
                asyncio.run(load(thread, streams, new_tokens, live=live))  # warm-up
                rate, wait = asyncio.run(load(thread, streams, new_tokens, live=live))
                name = f"serve: {streams} streams{', live text' if live else ''}"
                bench.keep(name, {"tokens_per_s": round(rate, 1), "slowest_first_token_s": wait})
                bench.say(f"{name:30} {rate:9,.0f} tok/s, first token within {wait * 1e3:.0f} ms")
    finally:
        thread.close()


async def load(
    thread: EngineThread, streams: int, new_tokens: int, *, live: bool
) -> tuple[float, float]:
    """Tokens per second of concurrent streams, and the longest wait for a first token."""
    rng = np.random.default_rng(0)
    sampling = Sampling(max_new_tokens=new_tokens, top_k=TOP_K, ignore_eos=True)

    async def one(prompt: list[int]) -> float:
        waited, begin = 0.0, time.perf_counter()
        async for _ in thread.stream([Sequence(prompt, sampling, live_text=live)]):
            waited = waited or time.perf_counter() - begin
        return waited

    prompts = rng.integers(50_000, size=(streams, PROMPT_TOKENS)).tolist()
    begin = time.perf_counter()
    waits = await asyncio.gather(*map(one, prompts))
    return streams * new_tokens / (time.perf_counter() - begin), round(max(waits), 4)
