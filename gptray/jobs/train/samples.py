"""Samples during training: the model continues the config's prompts, or validation text."""

from __future__ import annotations

from gptray.config import Config
from gptray.data.openings import Opening, openings
from gptray.data.tokens import TokenData
from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling, numbered_seed
from gptray.model.gpt import GPT
from gptray.training.device import without_determinism


def sample_texts(config: Config, data: TokenData, model: GPT) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs for the config's prompts, or for `openings` of the text."""
    given, special = config.sample.prompt, config.sample.parse_special
    if given is None:
        prompts = openings(data)
    else:
        prompts = [Opening(one, special) for one in ([given] if isinstance(given, str) else given)]
    n_positions = model.config.n_positions
    engine = Engine(model, data.tokenizer, max_batch_size=len(prompts), dtype=model.compute_dtype)
    sequences = []
    for number, (prompt, parse_special) in enumerate(prompts):
        ids = data.tokenizer.prompt_ids(prompt, parse_special=parse_special)
        sampling = Sampling.of(config.sample, seed=numbered_seed(config.sample.seed, number))
        ids = data.tokenizer.last_ids(ids, n_positions // 2)
        sequences.append(Sequence(ids, sampling))
    with without_determinism():
        engine.run(sequences)
    return [(prompt, one.text) for (prompt, _), one in zip(prompts, sequences, strict=True)]
