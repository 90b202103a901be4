"""Chat requests, with every key checked, as `gptray.serving.protocol` does for completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from gptray.config.limits import within
from gptray.data.chat_template import messages_of
from gptray.serving.protocol import CompletionRequest, GenerationRequest, Strict, check_min_tokens

# OpenAI's limit; a server's own may be lower.
MAX_TOP_LOGPROBS = 20


class ChatPrompt(Strict):
    """A chat and how the template writes it."""

    messages: Annotated[list[dict[str, str]], PlainValidator(messages_of)]
    add_generation_prompt: bool = True
    # Whether to continue the last message rather than answer it.
    continue_final_message: bool = False
    # The template's own variables, such as enable_thinking.
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ends_agree(self) -> ChatPrompt:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        return self

    @property
    def writing(self) -> dict[str, Any]:
        """The options for `ChatTemplate.prompt`."""
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "variables": self.chat_template_kwargs,
        }


class TokenizeChatRequest(ChatPrompt):
    """POST /tokenize with a chat."""

    model: str | None = None
    return_token_strs: bool = False


class ChatRequest(ChatPrompt, GenerationRequest):
    """The keys of POST /v1/chat/completions."""

    # None: as many as the context has room for.
    max_tokens: Annotated[int, within("max_new_tokens", low=1)] | None = None
    max_completion_tokens: Annotated[int, within("max_new_tokens", low=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _keys_agree(self) -> ChatRequest:
        if self.longest is not None:
            check_min_tokens(self.min_tokens, self.longest)
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer; None: as many as fit."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def completion(self, prompt: list[int], *, longest: int) -> CompletionRequest:
        """The equivalent completion request. longest: max_tokens if the request sets no limit."""
        common = {key: getattr(self, key) for key in GenerationRequest.model_fields}
        return CompletionRequest.model_construct(
            **common,
            prompt=[prompt],
            max_tokens=longest if self.longest is None else self.longest,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
