"""Chats as OpenAI's clients send them: a completion of the prompt that the template writes."""

from __future__ import annotations

import asyncio
from functools import cached_property, partial
from itertools import islice
from typing import Annotated, TypedDict

from pydantic import Field, PlainValidator, model_validator

from gptray.config import ServeConfig
from gptray.config.limits import within
from gptray.generation.chat_template import messages_of
from gptray.serving.api_error import ApiError
from gptray.serving.choices import Choice, Logprobs
from gptray.serving.completions import Completion, check_name
from gptray.serving.endpoint import NO_TEXT, Served
from gptray.serving.protocol import CompletionRequest, GenerationRequest, check_min_tokens

# Clients ask for at most so many; a server's own limit may be lower.
MAX_TOP_LOGPROBS = 20


class ChatRequest(GenerationRequest):
    """The keys of POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, str]], PlainValidator(messages_of)]
    # None: to the end of the context.
    max_tokens: Annotated[int, within("max_new_tokens", low=1)] | None = None
    max_completion_tokens: Annotated[int, within("max_new_tokens", low=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    # Whether the last message is continued, not answered.
    continue_final_message: bool = False
    # The template's own variables, such as enable_thinking.
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keys_agree(self) -> ChatRequest:
        if self.longest is not None:
            check_min_tokens(self.min_tokens, self.longest)
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        return self

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer; None: what fits."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def completion(self, prompt: list[int], *, longest: int) -> CompletionRequest:
        """The same request about a prompt. longest: tokens of an answer where it names no limit."""
        common = {key: getattr(self, key) for key in GenerationRequest.model_fields}
        return CompletionRequest.model_construct(
            **common,
            prompt=[prompt],
            max_tokens=longest if self.longest is None else self.longest,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TopLogprob(TypedDict):
    """A token with its log-probability; bytes: of its text, null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer beside the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatCompletion(Completion):
    """A chat with the model that answers it; choices are messages."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    @classmethod
    async def of_chat(cls, body: ChatRequest, served: Served, limits: ServeConfig) -> Completion:
        """Check a chat against the model and the limits. Raises ApiError."""
        check_name(served, body.model)
        if served.chat is None:
            message = f"{served.name!r} has no chat template: call POST /v1/completions"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        try:
            ids = await _prompt_ids(body, served)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        longest = served.engine.n_positions
        return await cls.of(body.completion(ids, longest=longest), served, limits)

    @cached_property
    def _begun(self) -> set[int]:
        """The choices whose role was told."""
        return set()

    def whole_choice(self, choice: Choice) -> dict[str, object]:
        message = {"role": "assistant", "content": choice["text"], "refusal": None}
        return {**self._ends(choice), "message": message}

    def chunk_choice(self, choice: Choice) -> dict[str, object]:
        role = {} if choice["index"] in self._begun else {"role": "assistant"}
        self._begun.add(choice["index"])
        return {**self._ends(choice), "delta": {**role, "content": choice["text"]}}

    def _ends(self, choice: Choice) -> dict[str, object]:
        """What a choice has beside its text."""
        told = choice["logprobs"]
        content = told and {"content": _token_logprobs(told, self.body.logprobs or 0)}
        return {
            "index": choice["index"],
            "logprobs": content,
            "finish_reason": choice["finish_reason"],
        }


async def _prompt_ids(body: ChatRequest, served: Served) -> list[int]:
    """The prompt as the model's template writes it. Raises ValueError."""
    assert served.chat is not None
    render = partial(
        served.chat.prompt,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    # In a thread: the first takes a second, and a template may take long.
    _, ids = await asyncio.to_thread(render)
    return ids


def _token_logprobs(told: Logprobs, count: int) -> list[TokenLogprob]:
    """The form that chats have: a list of tokens, each with its `count` likeliest."""
    found: list[TokenLogprob] = []
    for token, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        likeliest = islice((top or {}).items(), count)
        found.append(
            {**_of_token(token, logprob), "top_logprobs": [_of_token(*one) for one in likeliest]}
        )
    return found


def _of_token(token: str, logprob: float | None) -> TopLogprob:
    assert logprob is not None  # only the first token of an echoed prompt has none
    text = None if token.startswith(NO_TEXT) else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": text}
