"""OpenAI batch files: JSON lines of HTTP requests, each with custom_id, method, url and body."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from gptray.config import GenerateConfig, UserError
from gptray.data.batches import Values, first_row, is_json
from gptray.data.sources import SourceFile

ID_KEY = "custom_id"
KEYS = (ID_KEY, "method", "url", "body")
COMPLETIONS_URL, CHAT_URL = "/v1/completions", "/v1/chat/completions"


class RowRequest(NamedTuple):
    """One row's prompt and settings, or the reason why it cannot run."""

    prompt: object
    settings: dict[str, object]
    error: str | None


def holds_requests(files: Sequence[SourceFile], settings: GenerateConfig) -> bool:
    """Whether the input consists of OpenAI batch files, judged by the first row of each.

    Raises UserError if only some of the files are.
    """
    found = {file.name: _is_requests(file, settings.prompt_column) for file in files}
    kinds = {name: kind for name, kind in found.items() if kind is not None}
    if not any(kinds.values()):
        return False
    other = next((name for name, is_requests in kinds.items() if not is_requests), None)
    if other is not None:
        first = next(name for name, is_requests in kinds.items() if is_requests)
        raise UserError(
            f"generate.input_path: {first} is an OpenAI batch file and {other} is not; run them "
            "as two jobs"
        )
    return True


def check_urls(files: Sequence[SourceFile], urls: Collection[str]) -> None:
    """Raise UserError if no row of OpenAI batch files is a completion or chat completion."""
    if not {COMPLETIONS_URL, CHAT_URL} & {*urls}:
        listed = ", ".join(sorted(urls)[:3])
        raise UserError(
            f"{files[0].name}: every request is for {listed}; a batch job runs requests for "
            f"{COMPLETIONS_URL} and {CHAT_URL}"
        )


def begins_with_chat(file: SourceFile, prompt_column: str) -> bool:
    """Whether it is an OpenAI batch file whose first row is a chat completion."""
    first = first_row(file) if is_json(file) else None
    return (
        first is not None and _is_request(first[1], prompt_column) and first[1]["url"] == CHAT_URL
    )


def _is_requests(file: SourceFile, prompt_column: str) -> bool | None:
    """None if it has no rows to judge by."""
    if not is_json(file):
        return False
    first = first_row(file)
    return None if first is None else _is_request(first[1], prompt_column)


def _is_request(row: Values, prompt_column: str) -> bool:
    return set(KEYS) <= row.keys() and prompt_column not in row
