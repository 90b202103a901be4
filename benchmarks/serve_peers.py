"""Servers that benchmarks/serve.py measures, each a process: python serve_peers.py KIND FOLDER PORT

app: gptray's routes on uvicorn, without Ray. hf: FastAPI and transformers' generate, one request
at a time. batch: transformers' generate over batches of up to 32 from Ray Serve's @serve.batch,
with an event for every eighth token, since Serve's proxy takes as long per event as the model per
token; finished requests are held until their whole batch is done, so that all clients ask again
together and fill the next batch. All stream, in bf16, and stop on SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from generate import hf_model

BATCH_SIZE, BATCH_WAIT_S = 32, 0.2
MAX_CLIENTS, EVENT_STEPS = 256, 8


class HuggingFace:
    """A transformers model that streams the tokens of each decoding step."""

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self._model = hf_model(model_dir, "bf16")
        self._model.generation_config.eos_token_id = None

    def generate(self, bodies: Sequence[Any], tell: Callable[[list[str]], None]) -> None:
        """Complete a left-padded batch; pass one event per row to `tell` at each step."""
        longest = max(len(body["prompt"]) for body in bodies)
        pads = [longest - len(body["prompt"]) for body in bodies]
        ids = torch.tensor([[0] * pad + b["prompt"] for pad, b in zip(pads, bodies, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(body["max_tokens"] for body in bodies),
                do_sample=True,
                top_k=bodies[0].get("top_k", 50),
                pad_token_id=0,
                streamer=_Steps(lambda step, tokens: tell(self._events(step, tokens))),
            )

    def _events(self, step: int, tokens: list[int]) -> list[str]:
        contents = [
            {
                "choices": [{"text": self._tokenizer.decode([token])}],
                "usage": {"completion_tokens": step},
            }
            for token in tokens
        ]
        return [f"data: {json.dumps(content)}\n\n" for content in contents]


class _Steps:
    """A streamer for `generate`, which puts the prompts first, then the tokens of each step."""

    def __init__(self, tell: Callable[[int, list[int]], None]) -> None:
        self._step, self._tell = 0, tell

    def put(self, tokens: torch.Tensor) -> None:
        if self._step:
            self._tell(self._step, tokens.tolist())
        self._step += 1

    def end(self) -> None:
        pass


class ClientGone(Exception):
    """Aborts a generation whose client has disconnected."""


class OneAtATime:
    """A thread that completes requests in order of arrival."""

    def __init__(self, model: HuggingFace) -> None:
        self._model = model
        self._line: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def events(self, body: Any) -> AsyncGenerator[str, None]:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()

        def tell(events: list[str] | None) -> None:
            if gone.is_set():
                raise ClientGone
            loop.call_soon_threadsafe(told.put_nowait, events[0] if events else None)

        def complete() -> None:
            self._model.generate([body], tell)
            tell(None)

        self._line.put(complete)
        try:
            while (event := await told.get()) is not None:
                yield event
        finally:
            gone.set()

    def _work(self) -> None:
        while True:
            complete = self._line.get()
            try:
                complete()
            except ClientGone:
                continue


def hf(model_dir: str, port: int) -> None:
    one_at_a_time, app = OneAtATime(HuggingFace(model_dir)), FastAPI()

    @app.get("/health")
    async def health() -> None:
        pass

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(one_at_a_time.events(await request.json()))

    _run_uvicorn(app, port)


def app(model_dir: str, port: int) -> None:
    from gptray.config import Config, override
    from gptray.serving.app import make_app
    from gptray.serving.endpoint import Endpoint, Served

    config = override(Config(), {"generate.precision": "bf16"})
    endpoint = Endpoint()
    endpoint.serve(Served.load(model_dir, "benchmark", config))
    _run_uvicorn(make_app(endpoint, config.serve), port)


def batch(model_dir: str, port: int) -> None:
    from ray import serve

    from gptray.jobs.cluster.connection import ray_cluster

    @serve.deployment(
        max_ongoing_requests=MAX_CLIENTS, ray_actor_options={"num_cpus": os.cpu_count()}
    )
    class Batches:
        def __init__(self) -> None:
            self._model = HuggingFace(model_dir)

        async def __call__(self, request: Request) -> Response:
            if request.method == "GET":
                return Response()
            return StreamingResponse(self._events(await request.json()))

        @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)  # type: ignore[untyped-decorator]
        async def _events(self, bodies: list[Any]) -> AsyncGenerator[list[Any], None]:
            loop = asyncio.get_running_loop()
            told: asyncio.Queue[list[str]] = asyncio.Queue()

            def tell(events: list[str]) -> None:
                loop.call_soon_threadsafe(told.put_nowait, events)

            done = loop.run_in_executor(None, self._model.generate, bodies, tell)
            lasts = [body["max_tokens"] for body in bodies]
            steps: list[list[str]] = []
            while len(steps) < max(lasts):
                steps.append(await told.get())
                if len(steps) % EVENT_STEPS == 0 or len(steps) == max(lasts):
                    yield [steps[min(len(steps), n) - 1][row] for row, n in enumerate(lasts)]
            await done

    application: Any = Batches
    with ray_cluster():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application.bind())
        signal.sigwait({signal.SIGTERM})
        serve.shutdown()


def _run_uvicorn(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    # Block SIGTERM before any thread starts, so that all inherit the mask and sigwait receives it.
    if sys.argv[1] == "batch":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    {"app": app, "hf": hf, "batch": batch}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
