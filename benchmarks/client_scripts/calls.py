"""Shared by all Python clients' scripts: makes a client's calls one by one and reports them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

URL, MODEL = sys.argv[1:3]
PROMPT, PROMPTS = "the cat sat", ["the cat", "on the mat", "a dog"]


def report(calls: Mapping[str, Callable[[], Any]]) -> None:
    """Print a JSON line per call, with its result or its error."""
    for name, call in calls.items():
        try:
            said, ok = call(), True
        except Exception as error:
            said, ok = f"{type(error).__name__}: {error}", False
        print(json.dumps({"call": name, "ok": ok and said is not None, "said": said}, default=str))


def refused(call: Callable[[], Any]) -> str:
    """The error of an unsupported call; AssertionError unless it names what is supported."""
    try:
        call()
    except Exception as error:
        assert "POST /v1/completions" in str(error), error
        return f"refused: {error}"
    raise AssertionError("the call was answered")


def same(first: Any, second: Any) -> Any:
    """The result of two calls with the same seed; AssertionError if they differ."""
    assert first == second, f"{first!r} is not {second!r}"
    return first


def without(stop: str, text: str) -> str:
    """A text that ended at a stop string; AssertionError if it contains the stop string."""
    assert stop not in text, f"{stop!r} is in {text!r}"
    return text


def counted(number: int, found: list[Any]) -> list[Any]:
    """The list; AssertionError unless it has `number` items."""
    assert len(found) == number, f"{len(found)} for {number}"
    return found
