"""The errors that end a job with a message: a user's mistake, or a run that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(ValueError):
    """A user's mistake; the message names the key or file and what to change. Exit code 2."""


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Begin the message of a UserError in the block with a key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


class RunFailed(RuntimeError):
    """A run that cannot continue; the message says all that the user needs. Exit code 1."""


class WorkerFailed(RuntimeError):
    """The failure of one worker among several; the others may wait for it until its process ends.

    Not a RunFailed, which all workers return together.
    """


def missing_module(error: Exception) -> str | None:
    """What to install if an error says that a package is missing; None for any other error."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if not missing or missing.startswith("gptray.") or find_spec(missing.partition(".")[0]):
        return None
    return (
        f"{sys.prefix} lacks the package {missing}; install gptray there again (pip install -e . "
        "in its folder), which brings what it requires"
    )
