"""What jobs print as their results, and what they say where that cannot be written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import TextIO

from gptray.config import RunFailed
from gptray.visible import visible_json


class Unread(Exception):
    """The reader of standard output has closed it, as in `| head`."""


def write_out(text: str) -> None:
    """Write a text to standard output at once.

    Raises:
        Unread: its reader has closed it.
        RunFailed: it is a file on a disk that is full, or the like.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)
        raise Unread from None
    except OSError as error:
        give_up(sys.stdout)
        raise RunFailed(f"cannot write to standard output: {error.strerror}") from None


def json_line(result: dict[str, object]) -> str:
    """A result as one line of JSON, in characters that standard output can show."""
    ascii_only = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    return visible_json(json.dumps(result, allow_nan=False, ensure_ascii=ascii_only)) + "\n"


def line_printer() -> Callable[[dict[str, object]], None]:
    """A function that prints a result before the job ends, to the stdout of now: Ray redirects it.

    Where nobody reads the line any more, the job still runs on.
    """
    stdout = sys.stdout

    def print_line(result: dict[str, object]) -> None:
        with redirect_stdout(stdout), suppress(Unread):
            write_out(json_line(result))

    return print_line


def give_up(stream: TextIO) -> None:
    """Write to nowhere: what is left in the buffer would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
