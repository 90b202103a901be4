"""The application over a tiny real model, behind a real HTTP server on a free port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from gptray.config import ServeConfig
from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.model.gpt import GPT
from gptray.serving.api_keys import Keys
from gptray.serving.app import make_app
from gptray.serving.endpoint import Endpoint, Served
from tests.generation.models import random_gpt, small_tokenizer

TOKENIZER = small_tokenizer()
OF_MODEL = ("parse_special", "utf8", "example_prompt", "chat_template")


def tiny(seed: int = 0, **shape: object) -> GPT:
    return random_gpt(TOKENIZER, seed=seed, **shape)


def served(
    model: GPT,
    limits: ServeConfig,
    name: str = "tiny",
    *,
    tokenizer: Tokenizer = TOKENIZER,
    **of_model: Any,
) -> Served:
    engine = Engine(model, tokenizer, max_batch_size=limits.max_batch_size)
    return Served(name, engine, tokenizer, limits.max_waiting, **of_model)


@dataclass
class Server:
    """A running server: where it is, what it serves, and its event loop."""

    url: str
    endpoint: Endpoint
    limits: ServeConfig
    loop: asyncio.AbstractEventLoop

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric, its labels as Prometheus writes them; 0 if it is not there yet."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=60)


@contextmanager
def running(
    model: GPT | None = None,
    *,
    keys: Keys | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    **settings: Any,
) -> Iterator[Server]:
    """A server in a thread of its own. settings: of the serve section, and of `Served`."""
    of_model = {key: settings.pop(key) for key in OF_MODEL if key in settings}
    limits = ServeConfig(**settings)
    endpoint = Endpoint()
    app = make_app(endpoint, limits, keys=keys)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
    server, started = uvicorn.Server(config), threading.Event()

    async def main() -> None:
        network = tiny() if model is None else model
        endpoint.serve(served(network, limits, tokenizer=tokenizer, **of_model))
        # Named as TCP, or asyncio leaves its delays on.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        found.append((listening.getsockname()[1], asyncio.get_running_loop()))
        started.set()
        await server.serve(sockets=[listening])

    found: list[tuple[int, asyncio.AbstractEventLoop]] = []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait()
    port, loop = found[0]
    try:
        yield Server(f"http://127.0.0.1:{port}", endpoint, limits, loop)
    finally:
        server.should_exit = True
        thread.join()
        if endpoint.served is not None:
            endpoint.served.close()
