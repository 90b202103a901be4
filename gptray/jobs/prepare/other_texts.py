"""Checks the texts of evaluate.also before a job starts; imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gptray.config import Config, UserError
from gptray.config.named_texts import named_texts
from gptray.data.request import Request, whole_request
from gptray.jobs.base import Mistakes
from gptray.jobs.prepare.check import CheckedText, check_text

ALSO_KEY = "evaluate.also"
OtherTexts = Mapping[str, CheckedText]


def check_also(config: Config, text: Config, *, trained_on: Request | None) -> OtherTexts:
    """Find the texts of a config's evaluate.also, to be read like `text`.

    Raises UserError with all mistakes, including a text that is also trained on.
    """
    found, mistakes = {}, Mistakes()
    for name, source in named_texts(config.evaluate.also).items():
        with mistakes:
            found[name] = check_text(text, partial(whole_request, source=source, key=ALSO_KEY))
            _check_held_out(name, found[name].request, trained_on)
    mistakes.raise_any()
    return found


def _check_held_out(name: str, request: Request, trained_on: Request | None) -> None:
    if trained_on is None:
        return
    places = {file.place for file in trained_on.source.files}
    shared = [file.name for file in request.source.files if file.place in places]
    if not request.source.files and not places:
        shared = ["builtin"]
    if shared:
        raise UserError(
            f"{ALSO_KEY}: {name} is not held-out text: {shared[0]} is also part of "
            f"{trained_on.source.key}; leave it out of one of them"
        )
