"""Rows of OpenAI batch files: a request's body, read as the endpoint reads it, for a batch job."""

from __future__ import annotations

from typing import Any

from gptray.data.batch_requests import COMPLETIONS_URL, RowRequest
from gptray.data.batches import Values
from gptray.serving.api_error import ApiError
from gptray.serving.protocol import CompletionRequest, parse_request

# The request's keys that set how its row is sampled, and the sampler's names for them. What a
# request leaves out is the job's, as in every other row.
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    **{
        name: name
        for name in (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias", "ignore_eos", "seed", "stop",
        )
    },
}  # fmt: skip
# What a batch row has no place for.
_ONLY_HTTP = ("stream", "echo", "logprobs")


def read_request(row: Values) -> RowRequest:
    """What a line with method, url and body asks for; what it cannot have is its error."""
    method, url, body = row["method"], row["url"], row["body"]
    prompt = body.get("prompt") if isinstance(body, dict) else None
    if method != "POST":
        return RowRequest(prompt, {}, f"method must be POST, got {method!r}")
    if url != COMPLETIONS_URL:
        return RowRequest(prompt, {}, f"url must be {COMPLETIONS_URL}, got {url!r}")
    if not isinstance(body, dict):
        return RowRequest(prompt, {}, f"body must be an object, got {body!r}")
    try:
        request = parse_request(CompletionRequest, body)
    except ApiError as error:
        # A value that it shows may hold half a surrogate pair.
        problem = error.message.encode("utf-8", "backslashreplace").decode()
        return RowRequest(prompt, {}, problem)
    if len(request.prompt) == 1 and isinstance(request.prompt[0], str):
        prompt = request.prompt[0]
    given = request.model_fields_set & SETTINGS.keys()
    settings = {SETTINGS[key]: _value(request, key) for key in sorted(given)}
    return RowRequest(prompt, settings, _too_much(request, prompt))


def _value(request: CompletionRequest, key: str) -> Any:
    """The setting as the sampler takes it: off is null."""
    value = getattr(request, key)
    return None if key == "top_k" and value < 1 else value


def _too_much(request: CompletionRequest, prompt: Any) -> str | None:
    if request.n > 1:
        return f"n={request.n}: a batch row has one output; set generate.num_samples for more"
    for key in _ONLY_HTTP:
        if (value := getattr(request, key)) not in (False, None):
            return f"{key}={value} is for the endpoint, not for a batch job"
    if isinstance(prompt, list):
        return "prompt must be one text; give each prompt a request of its own"
    return None
