"""Checks the texts of evaluate.also before a job starts, then prepares them like the run's text.

Imports neither torch nor Ray before preparing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptray.config import Config, UserError
from gptray.config.named_texts import named_texts
from gptray.data.request import Request, whole_request
from gptray.data.tokens import TokenData
from gptray.jobs.base import Mistakes
from gptray.jobs.prepare.check import CheckedText, check_text
from gptray.jobs.prepare.run import stored_text
from gptray.record import last_event, read_events

KEY = "evaluate.also"
OtherTexts = Mapping[str, CheckedText]


def check_also(config: Config, text: Config, *, trained_on: Request | None) -> OtherTexts:
    """Find the texts of a config's evaluate.also, to be read like `text`.

    Raises UserError with all mistakes, including a text that is also trained on.
    """
    found, mistakes = {}, Mistakes()
    for name, source in named_texts(config.evaluate.also).items():
        with mistakes:
            found[name] = check_text(text, partial(whole_request, source=source, key=KEY))
            _check_held_out(name, found[name].request, trained_on)
    mistakes.tell()
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
            f"{KEY}: {name} is not held-out text: {shared[0]} is also part of "
            f"{trained_on.source.key}; leave it out of one of them"
        )


def prepared_also(
    texts: OtherTexts, config: Config, data: TokenData, *, resumed: Path | None = None
) -> dict[str, Path]:
    """Prepare the texts with the tokenizer of `data`; return their folders by name. Needs Ray.

    resumed: a run that may have scored them. Raises UserError if a text has changed since or is too
    short, and like `stored_text`.
    """
    start = last_event(read_events(resumed), "start") if resumed else None
    scored = start.get("also_data", {}) if start else {}  # fingerprints by name
    folders = {}
    for name, text in texts.items():
        own = str(data.data_dir / "tokenizer")
        also = stored_text(config, replace(text.request, tokenizer=own, eos_token=None))
        if len(also.splits["test"]) < 2:
            raise UserError(f"{KEY}: {name} has fewer than 2 tokens; give more text")
        if resumed and scored.get(name) not in (None, also.fingerprint):
            raise UserError(
                f"{KEY}: the text {name} has changed since the run {resumed.name} started; choose "
                "another name for the run"
            )
        folders[name] = also.data_dir
    return folders
