"""Continues prompts in the terminal, as the text is generated, in this process, without Ray."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from gptray.config import Config, UserError
from gptray.jobs.cluster import check_resources
from gptray.jobs.generate.output import with_backend, with_built_backend
from gptray.jobs.models import find_model
from gptray.jobs.next_steps import of_model, tell
from gptray.standard_output import write_out
from gptray.visible import visible

log = logging.getLogger("gptray")


def look_here(config: Config) -> tuple[Config, Path, str]:
    """The config with its backend, the model's folder, and the name it was given by.

    Raises UserError if the job cannot run here.
    """
    check_resources(config.compute)
    config = with_backend(config)
    folder, name = find_model(config, config.generate.model, key="generate.model")
    return config, folder, name


def generate_here(config: Config) -> dict[str, Any]:
    """Print each prompt of `sample.prompt` and its continuations, one after another.

    All run in one batch; text waits until it is its turn to be printed. Returns the JSON line's
    facts; an output's `seed` reproduces it alone. Raises UserError for a prompt or a setting that
    cannot run.
    """
    picked, folder, name = look_here(config)
    config = with_built_backend(config, picked)
    given, samples = config.sample.prompt, range(config.generate.num_samples)
    prompts = [given] if isinstance(given, str) else list(given or [])
    prompts = [prompt for prompt in prompts for _ in samples]

    from gptray.generation.engine import load_engine
    from gptray.generation.request import Request
    from gptray.generation.settings import Sampling, numbered_seed

    engine, tokenizer = load_engine(
        folder,
        max_batch_size=min(len(prompts), config.generate.max_batch_size),
        precision=config.generate.precision,
        quantize=config.quantize.weights,
        device="cuda" if config.compute.use_gpu else "cpu",
        backend=config.generate.backend,
    )
    generations = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling.of(config.sample, seed=numbered_seed(config.sample.seed, number))
        try:
            ids = tokenizer.prompt_ids(prompt, parse_special=config.sample.parse_special)
            generations.append(engine.submit(Request(ids, sampling, live_text=True)))
        except ValueError as error:
            raise UserError(f"sample.prompt={prompt!r}: {error}") from None
    began = time.monotonic()
    for prompt, generation in zip(prompts, generations, strict=True):
        write_out(visible(prompt))
        shown = 0
        for _ in generation:
            write_out(visible(generation.text[shown:]))
            shown = len(generation.text)
        write_out(visible(generation.text[shown:]) + "\n")
        if generation.error:
            log.warning("sample.prompt=%r: %s", prompt, generation.error)
    seconds = time.monotonic() - began
    run = folder.parent if folder.name == "model" else folder
    tell([of_model(run)["serve"]])
    tokens = sum(len(generation.tokens) for generation in generations)
    return {
        "model": name,
        "output_path": None,
        "rows": len(prompts),
        "errors": sum(generation.error is not None for generation in generations),
        "output_tokens": tokens,
        "tokens_per_sec": round(tokens / seconds, 1),
        "outputs": [
            {
                "prompt": prompt,
                "output": generation.text,
                "finish_reason": generation.finish_reason,
                "output_tokens": len(generation.tokens),
                "seed": generation.request.sampling.seed,
            }
            for prompt, generation in zip(prompts, generations, strict=True)
        ],
    }
