"""Prints jobs' results, and handles a standard output that cannot be written."""

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
    """Write a text to standard output and flush it.

    Raises Unread if its reader has closed it; RunFailed for others, such as a file on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        redirect_to_null(sys.stdout)
        raise Unread from None
    except OSError as error:
        redirect_to_null(sys.stdout)
        raise RunFailed(f"cannot write to standard output: {error.strerror}") from None


def json_line(result: dict[str, object]) -> str:
    """A result as one line of JSON, in characters that standard output can encode."""
    ascii_only = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    return visible_json(json.dumps(result, allow_nan=False, ensure_ascii=ascii_only)) + "\n"


def line_printer() -> Callable[[dict[str, object]], None]:
    """A function that prints a result while the job runs, to the current stdout, which Ray will
    redirect.

    The job continues even if nobody reads the line.
    """
    stdout = sys.stdout

    def print_line(result: dict[str, object]) -> None:
        with redirect_stdout(stdout), suppress(Unread):
            write_out(json_line(result))

    return print_line


def redirect_to_null(stream: TextIO) -> None:
    """Redirect to /dev/null, or flushing the buffer would fail again when Python exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
