"""The config's `serve` section: the HTTP endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, field_validator

from gptray.config.values import (
    Natural,
    NonEmpty,
    NonNegative,
    Positive,
    PositiveInt,
    Processes,
    Section,
    model_to,
)

_HOST_NAME = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*\.?|\[[0-9a-fA-F:]+\]")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#*A-Z]+")


class ServeConfig(Section):
    """The HTTP endpoint: what it serves, where, and what a client may ask for."""

    model: Annotated[NonEmpty | None, model_to("serve")] = None
    adapters: dict[str, str] | NonEmpty | None = Field(
        None,
        description="adapters (LoRA) to serve alongside the model, by name: {tales: folder} is "
        "served as model:tales; each is a PEFT folder or a run that trained one; or one folder "
        "of such folders, watched while serving",
    )
    served_model_name: NonEmpty | None = Field(
        None, description="what clients call the model; null: the name of its run or folder"
    )
    host: NonEmpty = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0: all addresses of the machine"
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port to listen on")
    api_key_file: NonEmpty | None = Field(
        None,
        description="file with one key per line; clients must send one of them (Authorization: "
        "Bearer); null: no key needed",
    )
    allowed_hosts: str | list[str] | None = Field(
        None,
        description="Host names accepted besides the machine's own, such as api.example.com or "
        "*.example.com; *: any; null: none, or any if host is 0.0.0.0 or ::",
    )
    allowed_origins: str | list[str] | None = Field(
        None,
        description="web pages that may call from a browser, such as https://example.com; *: any "
        "(CORS)",
    )
    num_replicas: Processes = Field(
        1, description="engines, each with its own share of the cluster (Ray Serve)"
    )
    max_replicas: Processes | None = Field(
        None, description="replicas to grow to under load; null: always num_replicas"
    )
    max_batch_size: PositiveInt = Field(32, description="sequences that one engine runs at a time")
    max_waiting: PositiveInt = Field(
        128, description="sequences that may wait for an engine; beyond that the answer is 429"
    )
    max_body_bytes: PositiveInt = Field(1 << 20, description="longest body of a request")
    max_prompts: PositiveInt = Field(
        64,
        description="prompts of one request in the engine or its queue at a time; the others wait",
    )
    max_n: PositiveInt = Field(16, description="outputs for one prompt")
    max_outputs: PositiveInt = Field(
        2048, description="outputs for one request, all prompts together"
    )
    max_output_tokens: PositiveInt | None = Field(
        None,
        description="most tokens for one output, whatever max_tokens asks for; null: as many as "
        "the model's context holds",
    )
    max_stop: PositiveInt = Field(
        16, description="most stop strings, and most stop_token_ids, of a request"
    )
    max_logprobs: Natural = Field(
        20, description="most log-probabilities to return at each position"
    )
    body_timeout_s: Positive = Field(
        20.0, description="seconds for the body of a request to arrive"
    )
    request_timeout_s: Positive = Field(
        300.0, description="seconds that one request may take, including waiting"
    )
    drain_timeout_s: NonNegative = Field(
        30.0, description="seconds for running requests to finish when the server stops"
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, given: str | list[str] | None) -> str | list[str] | None:
        what = "a name without scheme, port or path, such as api.example.com, *.example.com or *"
        return _each_matches(given, _HOST_NAME, what)

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, given: str | list[str] | None) -> str | list[str] | None:
        what = (
            "a scheme and a name as browsers send them, without a path, such as "
            "https://example.com or http://localhost:3000, or * for any"
        )
        return _each_matches(given, _ORIGIN, what)

    def broken_rules(self) -> Iterator[str]:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            yield (
                f"serve.max_replicas={self.max_replicas} must not be below "
                f"serve.num_replicas={self.num_replicas}"
            )


def _each_matches(
    given: str | list[str] | None, pattern: re.Pattern[str], what: str
) -> str | list[str] | None:
    """Return the value unchanged. Raises ValueError for a text that does not match."""
    for one in [given] if isinstance(given, str) else given or []:
        if not pattern.fullmatch(one):
            raise ValueError(f"must be {what}" if one is given else f"{one!r} must be {what}")
    return given
