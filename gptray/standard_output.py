"""What jobs print as their results, and what is said when that cannot be written."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from gptray.config import RunFailed


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


def give_up(stream: TextIO) -> None:
    """Write to nowhere: what is left in the buffer would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
