"""Ray's messages about processes that it ended, each a page long, as one sentence."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

log = logging.getLogger("gptray")

# When a node's memory is nearly full, Ray kills the process that it can best repeat.
_FULL_MEMORY = re.compile(
    r"running low on memory.*?Memory usage (\d+)B exceeded .*?% of (\d+)B", re.DOTALL
)
# A process died otherwise. What follows are Ray's ids and guesses; the job says what it means.
_DEATH = "A worker died or was killed while executing a task"
# After such a message, Ray repeats the process's work and may soon kill it again.
_QUIET_S = 10.0


def why_ended(error: Exception | str, *, otherwise: str | None = None) -> str:
    """Why a process ended, by Ray's error: a full memory, or else `otherwise`.

    otherwise: by default the error's last line; those before it are Ray's ids. Of an error without
    text, it is the kind.
    """
    text = str(error).strip()
    if found := _FULL_MEMORY.search(text):
        return f"Ray killed its process because {_full(found)}"
    if otherwise is not None:
        return otherwise
    if text:
        return text.splitlines()[-1]
    return type(error).__name__ if isinstance(error, Exception) else "its process died"


def _full(found: re.Match[str]) -> str:
    used, limit = (int(size) / 1e9 for size in found.groups())
    return f"the node's memory was nearly full ({used:.1f} of {limit:.1f} GB in use)"


class RayMessages(io.TextIOBase):
    """A stream for what Ray prints: goes to stderr, with a sentence for each killed process."""

    def __init__(self) -> None:
        self._told = -_QUIET_S
        self._skips_end = False

    def write(self, text: str) -> int:
        if found := _FULL_MEMORY.search(text):
            self._tell(f"Ray killed a process because {_full(found)}; its work is repeated")
        elif _DEATH in text:
            self._tell("Ray lost a process, which was killed or out of memory")
        elif self._skips_end and text == "\n":
            self._skips_end = False
        else:
            sys.stderr.write(text)
        return len(text)

    def _tell(self, sentence: str) -> None:
        """Log a sentence instead of Ray's message, unless there was one a moment ago."""
        self._skips_end = True
        if time.monotonic() - self._told >= _QUIET_S:
            self._told = time.monotonic()
            log.warning("%s", sentence)

    def flush(self) -> None:
        sys.stderr.flush()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    def isatty(self) -> bool:
        return sys.stderr.isatty()
