"""Makes the process of a command line fit to run a job, however it was started."""

from __future__ import annotations

import io
import os
import select
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def set_up_process() -> None:
    """Open closed streams, take all paths as UTF-8, and let no message or warning end the job.

    May start the process again.
    """
    _open_closed_streams()
    _use_utf8()
    # Unbuffered below the lines: a signal between a write and its return would repeat a buffer.
    stderr = _Stderr(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(stderr, sys.stderr.encoding, "backslashreplace", "", True)
    # `python -W error`: libraries, Ray first, warn of what they use themselves.
    if any(option.startswith("e") for option in sys.warnoptions):
        warnings.simplefilter("default")


class _Stderr(io.FileIO):
    """Standard error; drops what cannot be written, such as to a terminal that was closed."""

    def write(self, data: ReadableBuffer, /) -> int:
        left = whole = memoryview(data).cast("B")
        with suppress(OSError):
            while left:
                written = super().write(left)
                if written is None:  # it is full, and its owner made it not block
                    select.select([], [self], [])
                left = left[written or 0 :]
        return whole.nbytes


def _open_closed_streams() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr, lest a file gets its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _use_utf8() -> None:
    """If the locale is not UTF-8, start again in Python's UTF-8 mode.

    Libraries treat all paths as UTF-8 whatever the locale, so Python must as well. Output keeps the
    terminal's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    words: list[str | bytes] = [*sys.orig_argv]
    with suppress(OSError):
        # The raw bytes: not every locale's decoding can be reversed.
        words = [*Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]]
    os.execv(sys.executable, [sys.executable, *words[1:]])
