"""What every Python client's script shares: its calls are made one by one and reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

URL, MODEL = sys.argv[1:3]
PROMPT, PROMPTS = "the cat sat", ["the cat", "on the mat", "a dog"]


def report(calls: Mapping[str, Callable[[], Any]]) -> None:
    """Print a JSON line per call: what it gave, or the error that it ended with."""
    for name, call in calls.items():
        try:
            said, ok = call(), True
        except Exception as error:
            said, ok = f"{type(error).__name__}: {error}", False
        print(json.dumps({"call": name, "ok": ok and said is not None, "said": said}, default=str))


def refused(call: Callable[[], Any]) -> str:
    """The error of a call that an endpoint of completions cannot answer, if it says what can."""
    try:
        call()
    except Exception as error:
        assert "POST /v1/completions" in str(error), error
        return f"refused: {error}"
    raise AssertionError("the call was answered")


def same(first: Any, second: Any) -> Any:
    """What two calls with one seed gave, if it is the same; else an AssertionError."""
    assert first == second, f"{first!r} is not {second!r}"
    return first


def without(stop: str, text: str) -> str:
    """A text that a stop string has ended, if that is not in it; else an AssertionError."""
    assert stop not in text, f"{stop!r} is in {text!r}"
    return text


def counted(number: int, found: list[Any]) -> list[Any]:
    """The list, if it is so long; else an AssertionError."""
    assert len(found) == number, f"{len(found)} for {number}"
    return found
