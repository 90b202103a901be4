"""Continues prompts in the terminal, streaming the text, in this process and without Ray."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from gptray.config import RunFailed, UserError, override
from gptray.generation.loading import decoder_backend
from gptray.jobs.generate.checked import CheckedModel
from gptray.jobs.generate.llm import LLM
from gptray.jobs.next_steps import of_model, tell
from gptray.model.shape import read_shape
from gptray.standard_output import write_out
from gptray.visible import visible

log = logging.getLogger("gptray")


def generate_here(model: CheckedModel) -> dict[str, Any]:
    """Print each prompt of `sample.prompt` and its continuations, one after another.

    All run in one batch; text waits for its turn to be printed. Returns the JSON line, in which an
    output's `seed` reproduces it alone. Raises UserError for a prompt or setting that cannot run.
    """
    config = model.config
    given, samples = config.sample.prompt, range(config.generate.num_samples)
    prompts = [given] if isinstance(given, str) else list(given or [])
    prompts = [prompt for prompt in prompts for _ in samples]
    size = config.generate.max_batch_size
    shape = read_shape(model.folder)
    change = {
        # The backend that a bulk job would choose, so that the text is the same.
        "generate.backend": decoder_backend(config, shape, max_batch_size=size),
        "generate.max_batch_size": min(len(prompts), size),
    }
    llm = LLM.of(replace(model, config=override(config, change)))
    try:
        sequences = llm.start(prompts, config.sample)
    except UserError as error:
        raise UserError(f"sample.{error}") from None
    began = time.monotonic()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        write_out(visible(prompt))
        try:
            for piece in llm.pieces(sequence):
                write_out(visible(piece))
        except RunFailed as error:
            log.warning("sample.prompt=%.60r: %s", prompt, error)
        write_out("\n")
    seconds = time.monotonic() - began
    run = llm.folder.parent if llm.folder.name == "model" else llm.folder
    tell([of_model(run, llm.name, adapter=config.generate.adapter)["serve"]])
    tokens = sum(len(one.tokens) for one in sequences)
    return {
        "model": llm.name,
        "output_path": None,
        "rows": len(sequences),
        "errors": sum(one.error is not None for one in sequences),
        "output_tokens": tokens,
        "tokens_per_sec": round(tokens / seconds, 1),
        "outputs": [
            {
                "prompt": prompt,
                "output": one.text,
                "finish_reason": one.finish_reason,
                "output_tokens": len(one.tokens),
                "seed": one.sampling.seed,
            }
            for prompt, one in zip(prompts, sequences, strict=True)
        ],
    }
