"""llama.cpp in this process, by the package xllamacpp; what imports this is skipped without it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

xllamacpp: Any = pytest.importorskip("xllamacpp")


class Llama:
    """A model in a GGUF file, computed on one thread with a cache in fp32."""

    def __init__(self, path: Path, *, context: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.warmup, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens' names are plain text."""
        ids: list[int] = self._post("/tokenize", content=text, parse_special=False)["tokens"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._post("/detokenize", tokens=list(ids))["content"]
        return text

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], str]:
        """The likeliest continuation: ids and text."""
        asked = {"n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
        done = self._post("/completion", prompt=list(prompt), cache_prompt=False, **asked)
        return done["tokens"], done["content"]

    def log_probs(self, prompt: Sequence[int], most: int) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens, in nats, by id."""
        asked = {"n_predict": 1, "temperature": 0, "n_probs": most}
        done = self._post("/completion", prompt=list(prompt), cache_prompt=False, **asked)
        likeliest = done["completion_probabilities"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in likeliest}

    def _post(self, path: str, **body: object) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            read: dict[str, Any] = json.load(answer)
            return read
