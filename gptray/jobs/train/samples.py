"""What a model writes while it is trained: it continues the config's prompts, or real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptray.config import Config, UserError
from gptray.data.openings import first_words
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData

if TYPE_CHECKING:
    from gptray.model.gpt import GPT


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse prompts that the tokenizer cannot read. Raises UserError naming sample.prompt."""
    prompts = config.sample.prompt or []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        try:
            tokenizer.prompt_ids(prompt, parse_special=config.sample.parse_special)
        except UserError as error:
            raise UserError(f"sample.prompt={prompt!r}: {error}") from None


def sample_texts(config: Config, data: TokenData, model: GPT) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt of the config, or for words of validation text."""
    from gptray.generation.engine import Engine
    from gptray.generation.sequence import Sequence
    from gptray.generation.settings import Sampling, numbered_seed

    prompts = config.sample.prompt
    if prompts is None:
        prompts = first_words(data)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    n_positions = model.config.n_positions
    engine = Engine(model, data.tokenizer, max_batch_size=len(prompts), dtype=model.compute_dtype)
    sequences = []
    for number, prompt in enumerate(prompts):
        ids = data.tokenizer.prompt_ids(prompt, parse_special=config.sample.parse_special)
        sampling = Sampling.of(config.sample, seed=numbered_seed(config.sample.seed, number))
        sequences.append(Sequence(ids[-(n_positions // 2) :], sampling))  # the end of a long prompt
    engine.run(sequences)
    return [(prompt, one.text) for prompt, one in zip(prompts, sequences, strict=True)]
