"""All of a user's mistakes in one message, rather than one at each start."""

from __future__ import annotations

from gptray.config import UserError


class Mistakes:
    """A context, entered again and again, that keeps the UserError of each block for `tell`."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, UserError):
            self.add(str(error))
        return isinstance(error, UserError)

    def add(self, message: str) -> None:
        """Note a mistake that nothing has raised."""
        self._messages.append(message)

    def tell(self) -> None:
        """Raise UserError with every message once, one line each; nothing without mistakes."""
        if self._messages:
            raise UserError("\n".join(dict.fromkeys(self._messages)))
