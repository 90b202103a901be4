"""llama.cpp as a peer of benchmarks/generate.py (pip install llama-cpp-python, built from source).

Uses its C functions, since the package's own class continues only one sequence at a time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptray.model.gguf_file import write_gguf
from gptray.model.gguf_names import family_of, gguf_numbers, gguf_tensors, gguf_vectors
from gptray.model.importance import quantizer
from gptray.model.stored_weights import stored_model

# Continues prompts of the same length by exactly the given number of tokens.
Continue = Callable[[Sequence[Sequence[int]], int], None]


def write_without_words(model_dir: Path, precision: str) -> Path:
    """Write a folder's model as a GGUF file without a vocabulary, for token ids only."""
    model = stored_model(model_dir)
    family = family_of(model)
    fields = {
        **gguf_numbers(model.shape, family),
        f"{family.architecture}.vocab_size": model.embedding.shape[0],
        "tokenizer.ggml.model": "no_vocab",
    }
    tensors, vectors = gguf_tensors(family, model, precision), gguf_vectors(model.shape)
    path = model_dir / f"{precision}.gguf"
    quantized = quantizer(model_dir, model, precision)
    write_gguf(
        path, family.architecture, fields, tensors, vectors,
        precision=precision, quantized=quantized,
    )  # fmt: skip
    return path


def open_llama(path: Path, *, most: int, length: int, top_k: int) -> Continue:
    """Open a model on all cores, for at most `most` sequences of `length` tokens at a time."""
    import llama_cpp

    cores = os.cpu_count() or 1
    api: Any = llama_cpp
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max = most * length, most
    params.n_threads = params.n_threads_batch = cores
    context = api.llama_init_from_model(model, params)
    assert context, path
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(top_k))
    api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(0))
    batch = api.llama_batch_init(params.n_batch, 0, 1)

    def decode(rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Read tokens, each with its position, its sequence and whether its logits are needed."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, is_last) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = ctypes.c_int8(is_last)
        assert api.llama_decode(context, batch) == 0

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        read = len(prompts[0])
        rows = [
            (token, position, sequence, position == read - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        decode(rows)
        ends = [at for at, row in enumerate(rows) if row[3]]
        for position in range(read, read + new_tokens):
            drawn = [api.llama_sampler_sample(chain, context, at) for at in ends]
            if position < read + new_tokens - 1:  # nothing follows the last token
                decode([(token, position, one, True) for one, token in enumerate(drawn)])
                ends = list(range(len(drawn)))

    return run
