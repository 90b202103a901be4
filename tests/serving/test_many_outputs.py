"""One request with more outputs than find room: they follow one another, and harm nobody."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.servers import Server, running, tiny

PROMPTS = [f"the {animal}" for animal in ("cat", "dog", "tree", "house", "cat sees")] * 3
DEADLINE_S = 20.0
SETTINGS = {"max_tokens": 9, "temperature": 1.2, "seed": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(max_batch_size=2, max_waiting=2, max_prompts=3) as server:
        yield server


def expected(server: Server) -> list[str]:
    """The texts of a server that has room for all of them."""
    with running(max_batch_size=32) as wide:
        answer = wide.post(prompt=PROMPTS, n=2, **SETTINGS)
    return [choice["text"] for choice in answer.json()["choices"]]


def test_more_prompts_and_outputs_than_find_room_get_their_texts(server: Server) -> None:
    texts = expected(server)
    whole = server.post(prompt=PROMPTS, n=2, **SETTINGS).json()["choices"]
    assert [choice["text"] for choice in whole] == texts
    assert [choice["index"] for choice in whole] == list(range(2 * len(PROMPTS)))
    single = server.post(prompt=PROMPTS[0], **SETTINGS).json()["choices"][0]["text"]
    assert single == texts[0]
    body = {"prompt": PROMPTS, "n": 2, "stream": True, **SETTINGS}
    streamed = [""] * len(texts)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_a_single_request_is_answered_while_a_larger_one_runs() -> None:
    large: dict[str, Any] = {
        "prompt": ["the"] * 40,
        "max_tokens": 150,
        "ignore_eos": True,
        "stream": True,
    }
    with running(tiny(n_positions=256), max_batch_size=2, max_waiting=4) as server:
        url = f"{server.url}/v1/completions"
        with (
            httpx.stream("POST", url, json=large, timeout=60) as one,
            httpx.stream("POST", url, json=large, timeout=60) as two,
        ):
            first, second = one.iter_lines(), two.iter_lines()
            assert next(first) == next(second) == ": accepted"
            assert server.post(prompt="the cat", max_tokens=2).status_code == 200
            assert server.metric("gptray_sequences_waiting") > 40
        # Those that left take what waited of theirs along.
        deadline = time.monotonic() + DEADLINE_S
        while server.metric("gptray_sequences_waiting") + server.metric("gptray_sequences_running"):
            assert time.monotonic() < deadline
        assert server.metric("gptray_output_tokens_total") < 40 * large["max_tokens"]
