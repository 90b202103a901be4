"""What ends a job in words: a mistake of the user's, or a run that fails."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user's: its message names the key or file and what to change; exit 2."""


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class RunFailed(RuntimeError):
    """A run that cannot continue; its message says all that the user needs; exit code 1."""


class WorkerFailed(RuntimeError):
    """As RunFailed, of one worker of several: the others may wait for it until its process ends.

    So it is no RunFailed, which workers return together.
    """
