"""Reads rows of OpenAI batch files: requests whose bodies are parsed as by the endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gptray.config import UserError
from gptray.data.batch_requests import CHAT_URL, COMPLETIONS_URL, RowRequest
from gptray.data.batches import Values
from gptray.data.chat_template import ChatTemplate
from gptray.data.prompts import CHAT
from gptray.data.tokenizer import Tokenizer
from gptray.data.written_names import put_together
from gptray.model.usage import Usage
from gptray.serving.api_error import ApiError
from gptray.serving.chat_request import ChatRequest
from gptray.serving.protocol import SAMPLED, CompletionRequest, GenerationRequest, parse_request

# Keys of a request that set how its row is sampled, and the sampler's names for them. The job's
# settings apply to keys that a request leaves out, as in all other rows.
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    **{name: name for name in (*SAMPLED, "top_k", "seed") if name != "logprobs"},
}
# Keys that batch rows do not support.
_ONLY_HTTP = (
    "stream", "echo", "logprobs", "add_special_tokens", "truncate_prompt_tokens",
    "return_token_ids", "return_tokens_as_token_ids",
)  # fmt: skip


@dataclass(frozen=True)
class RequestReader:
    """Reads rows for a model, whose chat template renders the prompts of chats."""

    model_dir: Path

    @cached_property
    def _template(self) -> ChatTemplate | None:
        source = Usage.of(self.model_dir).chat_template
        return ChatTemplate(source, Tokenizer.load(self.model_dir)) if source else None

    def __call__(self, row: Values) -> RowRequest:
        """Parse a line with method, url and body; if it is invalid, the result has the error.

        Raises UserError for a model whose template or tokenizer cannot be read.
        """
        body = row["body"]
        prompt = body.get("prompt") if isinstance(body, dict) else None
        try:
            return self._read(row)
        except UserError:  # not the row's fault
            raise
        except (ApiError, ValueError) as error:
            problem = error.message if isinstance(error, ApiError) else str(error)
            # The message may quote an unpaired surrogate.
            return RowRequest(prompt, {}, problem.encode("utf-8", "backslashreplace").decode())

    def _read(self, row: Values) -> RowRequest:
        method, url, body = row["method"], row["url"], row["body"]
        if method != "POST":
            raise ValueError(f"method must be POST, got {method!r}")
        if url not in (COMPLETIONS_URL, CHAT_URL):
            raise ValueError(f"url must be {COMPLETIONS_URL} or {CHAT_URL}, got {url!r}")
        if not isinstance(body, dict):
            raise ValueError(f"body must be an object, got {body!r}")
        if url == CHAT_URL:
            chat = parse_request(ChatRequest, body)
            _check(chat)
            return self._answer(chat)
        text = parse_request(CompletionRequest, body)
        _check(text)
        if len(text.prompt) != 1:
            raise ValueError("prompt must be a single one; give each prompt its own request")
        return RowRequest(text.prompt[0], _settings(text), None)

    def _answer(self, request: ChatRequest) -> RowRequest:
        """The row of a chat. Raises ValueError."""
        if self._template is None:
            raise ValueError(f"the model has no chat template: use {COMPLETIONS_URL}")
        chat = self._template.write(request.messages, **request.writing)
        return RowRequest(put_together(chat), {**_settings(request), CHAT: chat}, None)


def _settings(request: GenerationRequest) -> dict[str, object]:
    """The row's own settings, under the sampler's names."""
    given = request.model_fields_set
    found = {name: getattr(request, key) for key, name in SETTINGS.items() if key in given}
    return found | ({"top_k": None} if found.get("top_k", 1) < 1 else {})


def _check(request: GenerationRequest) -> None:
    """Raise ValueError for keys that batch rows do not support."""
    if request.n > 1:
        raise ValueError(
            f"n={request.n}: a batch row has one output; set generate.num_samples for more"
        )
    fields = type(request).model_fields
    for key in _ONLY_HTTP:
        if key in fields and (value := getattr(request, key)) != fields[key].default:
            raise ValueError(f"{key}={value} is for the endpoint, not for a batch job")
