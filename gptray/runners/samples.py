"""What a model writes while it is trained: it continues the config's prompts, or real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptray.config import Config, UserError
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData

if TYPE_CHECKING:
    from gptray.model.gpt import GPT

# A prompt from real text: words and characters at most, from so many tokens.
WORDS, CHARACTERS, TOKENS = 4, 24, 256


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
    from gptray.generation.request import Request
    from gptray.generation.settings import Sampling, numbered_seed

    prompts = config.sample.prompt
    if prompts is None:
        prompts = first_words(data)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    n_positions = model.config.n_positions
    engine = Engine(model, data.tokenizer, max_batch_size=len(prompts), dtype=model.compute_dtype)
    requests = []
    for number, prompt in enumerate(prompts):
        ids = data.tokenizer.prompt_ids(prompt, parse_special=config.sample.parse_special)
        sampling = Sampling.of(config.sample, seed=numbered_seed(config.sample.seed, number))
        requests.append(Request(ids[-(n_positions // 2) :], sampling))  # the end of a long prompt
    generations = engine.run(requests)
    return [(prompt, g.text) for prompt, g in zip(prompts, generations, strict=True)]


def first_words(data: TokenData) -> list[str]:
    """Prompts from text that the model does not train on: how two validation documents begin.

    Of a single document, which the split may have cut anywhere, how a line of it begins.
    """
    middle = len(data.val) // 2
    ends = (data.val.slice(middle, min(len(data.val), middle + 50_000)) == data.eos_id).nonzero()[0]
    after = middle + int(ends[0]) + 1 if len(ends) else len(data.val)
    begins = [_text(data, begin) for begin in (0, after) if begin < len(data.val)]
    if len(begins) == 1:
        begins = [begins[0].partition("\n")[2].lstrip() or begins[0]]
    return [_few_words(text) for text in begins if text]


def _text(data: TokenData, begin: int) -> str:
    """What stands at a place of the validation text, up to the end of its document."""
    ids = data.val.slice(begin, min(begin + TOKENS, len(data.val))).tolist()
    if data.eos_id in ids:
        ids = ids[: ids.index(data.eos_id)]
    return data.tokenizer.decode(ids).replace("\ufffd", "")


def _few_words(text: str) -> str:
    """The first words; of a short text not all, so that something is left to say."""
    words = text.split(" ")
    prompt = words[0][:CHARACTERS]
    for word in words[1 : min(WORDS, len(words) - 1)]:
        if len(prompt) + 1 + len(word) > CHARACTERS:
            break
        prompt += f" {word}"
    return prompt.rstrip() or text[:1]
