"""Whether the embedding of `model.init_from` fits the text's tokenizer; neither torch nor Ray."""

from __future__ import annotations

from gptray.config import Config, UserError
from gptray.data.request import tokenizer_name
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS, opens_at_once, tokenizer_files, tokenizer_path
from gptray.data.vocabulary import differing_ids
from gptray.files import expanded
from gptray.model.shape import read_shape

_CURE = (
    "set model.resize_vocab=true, which keeps the rows of tokens that both have and starts the "
    "others from the mean row"
)


def check_vocabulary(config: Config) -> None:
    """Refuse a tokenizer whose ids mean other tokens than the rows of model.init_from's embedding.

    Raises UserError naming both and model.resize_vocab; of a tokenizer that only a download or
    transformers can open, only where it is not the model's own.
    """
    source = config.model.init_from
    if source is None:
        return
    name = tokenizer_name(config)
    folder = expanded(source)
    has_own = not folder.is_dir() or bool(tokenizer_files(folder))
    if config.model.resize_vocab:
        if not has_own:
            raise UserError(
                f"model.resize_vocab=true: {source} holds no tokenizer (tokenizer.json), so "
                "the tokens of its embedding's rows are unknown"
            )
        return
    if name in KINDS:
        if has_own:
            raise UserError(
                f"data.tokenizer={name}: a new tokenizer's ids are not those of model.init_from="
                f"{source}; leave data.tokenizer out, or {_CURE}"
            )
        return
    rows, path = read_shape(source).rows, tokenizer_path(name)
    is_own = name == source or (path is not None and path == tokenizer_path(source))
    if is_own and (path is None or not opens_at_once(path)):
        return
    tokenizer = Tokenizer.load(name, eos_token=config.data.eos_token)
    if has_own and not is_own:
        others = differing_ids(Tokenizer.load(source), tokenizer)
        if others:
            raise UserError(
                f"data.tokenizer={name}: {others:,} of its {tokenizer.vocab_size:,} ids mean "
                f"other tokens than in model.init_from={source}; leave data.tokenizer out, or "
                f"{_CURE}"
            )
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"data.tokenizer={name}: has {tokenizer.vocab_size:,} tokens, the embedding of "
            f"model.init_from={source} only {rows:,} rows; {_CURE}"
        )
