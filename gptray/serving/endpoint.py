"""The served model, which can be replaced while requests are in flight.

A request keeps the model that it began with; a replaced model is closed after its last request. The
model's adapters run in the same engine; they may come and go, and a request keeps its adapter until
it ends. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path

from gptray.config import Config
from gptray.data.chat_template import ChatTemplate
from gptray.data.roundtrip import pieces
from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.detokenize import REPLACEMENT
from gptray.generation.engine import Engine
from gptray.generation.loading import open_engine, pack_adapter
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.adapter import Base, adapted_name
from gptray.model.example import load_example
from gptray.model.gpu_faults import memory_told
from gptray.model.usage import Usage
from gptray.serving.engine_thread import EngineThread, Overloaded
from gptray.serving.streams import EngineStopped

# A healthy engine generates a token within this time, however busy it is.
HEALTH_S, HEALTH_POLL_S = 5.0, 0.02
# Texts of at least this many characters are encoded outside the event loop.
LONG_TEXT = 4096
# Prefix of the name of a token that is part of a character.
NO_TEXT = "token_id:"


def token_id_name(token: int) -> str:
    """A token's name by its id."""
    return f"{NO_TEXT}{token}"


class Served:
    """A model with its tokenizer and the engine that runs it in its own thread.

    all: the model, and the model with each of its adapters, under other names.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        max_waiting: int,
        *,
        parse_special: bool = False,
        utf8: bool = True,
        example_prompt: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """parse_special (see `Tokenizer.prompt_ids`), utf8 (see `Sampling`): for all prompts."""
        self.name, self.engine, self.tokenizer = name, engine, tokenizer
        self._parse_special, self.utf8 = parse_special, utf8
        self.example_prompt = example_prompt
        self.chat = ChatTemplate(chat_template, tokenizer) if chat_template else None
        self.created = int(time.time())
        self.adapter: PackedAdapter | None = None
        # By the adapters' names; never mutated, since other threads read it.
        self._adapted: dict[str, Served] = {}
        self.thread = EngineThread(engine, max_waiting=max_waiting)
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: str | Path, name: str, config: Config) -> Served:
        """Open a model folder as the config says, with the adapters that the config names.

        Raises UserError if the model or an adapter is invalid, RunFailed if it does not fit a GPU.
        """
        serve = config.serve
        engine, tokenizer = open_engine(
            folder,
            config,
            max_batch_size=serve.max_batch_size,
            takes_adapters=serve.adapters is not None,
        )
        named = serve.adapters if isinstance(serve.adapters, dict) else {}
        base = Base.of(str(folder))
        with memory_told("serve.max_batch_size", serve.max_batch_size):
            packed = {one: pack_adapter(engine, base, source) for one, source in named.items()}
        special, example = config.sample.parse_special, load_example(Path(folder))
        served = cls(
            name,
            engine,
            tokenizer,
            serve.max_waiting,
            parse_special=special,
            utf8=config.sample.utf8,
            example_prompt=example.prompt if example and special >= example.parse_special else None,
            chat_template=Usage.of(Path(folder)).chat_template,
        )
        for one, adapter in packed.items():
            served.put(one, adapter)
        return served

    @property
    def all(self) -> list[Served]:
        return [self, *self._adapted.values()]

    def put(self, name: str, adapter: PackedAdapter) -> None:
        """Also serve the model with this adapter; it replaces one of the same name."""
        adapted = copy(self)
        adapted.name, adapted.adapter = adapted_name(self.name, name), adapter
        adapted.created, adapted._adapted = int(time.time()), {}
        self._adapted = dict(sorted({**self._adapted, name: adapted}.items()))

    def drop(self, name: str) -> None:
        """Stop serving an adapter; its memory is freed after its last request."""
        self._adapted = {other: one for other, one in self._adapted.items() if other != name}

    def called(self, name: str | None) -> Served:
        """This model or its adapter with this name; this model if there is no such adapter."""
        return next((one for one in self.all if one.name == name), self)

    def close(self) -> None:
        """Stop the engine after its current step."""
        self.thread.close()

    def token_text(self, token: int) -> str:
        """A token's text; for part of a character, its id."""
        if token not in self._token_texts:
            text = self.tokenizer.decode([token])
            self._token_texts[token] = token_id_name(token) if REPLACEMENT in text else text
        return self._token_texts[token]

    def token_bytes(self, token: int) -> bytes:
        """A token's text in UTF-8; for part of a character, its bytes."""
        text = self.token_text(token)
        return pieces(self.tokenizer)[token] if text.startswith(NO_TEXT) else text.encode()

    async def prompt_ids(self, text: str, *, add_prefix: bool = True) -> list[int]:
        """A prompt's token ids, see `Tokenizer.prompt_ids`.

        Raises ValueError for unknown characters.
        """
        special = self._parse_special
        encode = partial(
            self.tokenizer.prompt_ids, text, parse_special=special, add_prefix=add_prefix
        )
        return encode() if len(text) < LONG_TEXT else await asyncio.to_thread(encode)

    async def healthy(self) -> bool:
        """Whether the engine generates tokens; if it is idle, makes it generate one."""
        try:
            async with asyncio.timeout(HEALTH_S):
                before = self.thread.steps
                if not self.thread.running:
                    await self._generate_one()
                while self.thread.alive and self.thread.steps == before:
                    await asyncio.sleep(HEALTH_POLL_S)
            return self.thread.alive
        except (TimeoutError, Overloaded, EngineStopped):
            return False

    async def _generate_one(self) -> None:
        sampling = Sampling(max_new_tokens=1, temperature=0.0)
        sequence = Sequence([self.tokenizer.eos_id], sampling)
        async with aclosing(self.thread.stream([sequence])) as updates:
            async for update in updates:
                if update.error is not None:
                    raise EngineStopped(update.error)


class Endpoint:
    """The current model, and how many requests use it or its predecessors."""

    def __init__(self) -> None:
        self.draining = False
        self.served: Served | None = None
        self._users: Counter[Served] = Counter()
        self._idle = asyncio.Event()
        self._probe: asyncio.Task[bool] | None = None

    @property
    def active(self) -> int:
        """Requests in flight."""
        return self._users.total()

    def serve(self, served: Served) -> None:
        """Serve new requests with this model; the previous one closes after its last request."""
        before, self.served = self.served, served
        if before is not None:
            self._close_unused(before)

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[Served]:
        """The model for one request, kept open until the request ends. Raises EngineStopped.

        name: the model that the request asks for, which may be an adapter's.
        """
        served = self.served
        if served is None:
            raise EngineStopped("no model is loaded yet")
        self._users[served] += 1
        try:
            yield served.called(name)
        finally:
            self._users[served] -= 1
            self._close_unused(served)
            if not self.active:
                self._idle.set()

    async def healthy(self) -> bool:
        """Whether the model generates. Concurrent calls share one probe."""
        if self.served is None:
            return False
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self.served.healthy())
        return await asyncio.shield(self._probe)

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for those in flight; return how many are left at the end."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.active:
                    self._idle.clear()
                    await self._idle.wait()
        return self.active

    def _close_unused(self, served: Served) -> None:
        if served is not self.served and not self._users[served]:
            del self._users[served]
            # `close` waits for a step of the engine, which would block the event loop.
            asyncio.get_running_loop().run_in_executor(None, served.close)
