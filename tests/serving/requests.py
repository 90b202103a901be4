"""Requests as nobody should send them, a seed's own: each key wrong in its own way, or right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

# Written into the JSON as they are.
NUMBERS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-320", "0", "-0.0", "-1", "0.5", "1", "2",
    "7", "1e2", "1.0", "2147483648", "9223372036854775807", "9223372036854775808", "1" * 400,
    "1" * 5000, "true", "null", '"5"', "[]", "{}",
]  # fmt: skip
TEXTS = [
    '""', '"the cat"', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"',
    '"\u00ff\ufeff\u202e"', '"a\\nb\\r\\t"', '"<|endoftext|>"', '"' + "x " * 300 + '"', '"\\x"',
]  # fmt: skip
NUMERIC = [
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed",
    "logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "truncate_prompt_tokens",
]  # fmt: skip
FLAGS = [
    "echo", "stream", "ignore_eos", "include_stop_str_in_output", "return_token_ids",
    "return_tokens_as_token_ids",
]  # fmt: skip
OTHERS = [
    "model", "stop", "stop_token_ids", "logit_bias", "stream_options", "suffix", "user", "nonsense",
    "tempo", "response_format", "priority",
]  # fmt: skip


def fuzzed(count: int, *, seed: int, vocab_size: int) -> Iterator[bytes]:
    """Bodies of requests."""
    draw = random.Random(seed)
    for _ in range(count):
        keys = draw.sample(NUMERIC, draw.randrange(4)) + draw.sample(
            FLAGS + OTHERS, draw.randrange(3)
        )
        parts = [f'"{key}": {_value(draw, key, vocab_size)}' for key in keys]
        if draw.random() < 0.95:
            parts.append(f'"prompt": {_prompt(draw, vocab_size)}')
        if draw.random() < 0.5:
            parts.append('"max_tokens": 3')
        yield _damaged(draw, ("{" + ", ".join(parts) + "}").encode("utf-8", "surrogatepass"))


def _value(draw: random.Random, key: str, vocab_size: int) -> str:
    if draw.random() < 0.3:
        return draw.choice(NUMBERS + TEXTS)
    if key in FLAGS:
        return draw.choice(["true", "false"])
    if key == "logit_bias":
        bias: dict[Any, float] = {draw.randrange(-2, vocab_size + 5): draw.uniform(-110, 110)}
        return json.dumps(bias)
    if key == "stop_token_ids":
        ids = [draw.randrange(-1, vocab_size + 1) for _ in range(draw.randrange(5))]
        return draw.choice([json.dumps(ids), "[5]", "[true]", "[1.5]", "[[1]]", "[" + "7," * 99])
    if key == "stop":
        return draw.choice(['"e"', '["a", "b"]', '[""]', '["' + "y" * 300 + '"]', "[1]"])
    if key == "stream_options":
        return draw.choice(['{"include_usage": true}', '{"include_usage": 1}', "null"])
    return draw.choice(NUMBERS) if key in NUMERIC else draw.choice(TEXTS)


def _prompt(draw: random.Random, vocab_size: int) -> str:
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice(TEXTS + NUMBERS)
    if kind == 1:
        ids = [draw.randrange(-1, vocab_size + 1) for _ in range(draw.randrange(70))]
        return json.dumps(ids)
    if kind == 2:
        return json.dumps([[draw.randrange(vocab_size)] * draw.randrange(3) for _ in range(3)])
    if kind == 3:
        return "[" * (depth := draw.randrange(1, 2000)) + "]" * depth
    return draw.choice(['"the cat"', '["a", "dog sees"]', "[1, 2, 3]", "[[4], [5, 6]]"])


def _damaged(draw: random.Random, body: bytes) -> bytes:
    if draw.random() < 0.9:
        return body
    at = draw.randrange(len(body))
    return draw.choice([body[:at], body[:at] + b"\xff" + body[at:], body + body, b"\x00" + body])
