"""Which models may be scored together, by the average of their probabilities. No torch, no Ray."""

from __future__ import annotations

from typing import Any

from gptray.config import Config, UserError, flatten, load_config
from gptray.data.tokenizer import Tokenizer
from gptray.jobs.evaluate.evaluated_model import FoundModel
from gptray.jobs.models import CONFIG
from gptray.jobs.places import with_whole_paths
from gptray.model.shape import read_shape

# Keys that decide which text is held out; so does the seed of the split.
_HOLD_OUT = ("source", "val_source", "test_source", "text_column", "separator", "encoding", "split")


def check_goes_with(
    first: FoundModel, other: FoundModel, block_size: int, *, own_text: Config | None
) -> None:
    """Refuse a model whose probabilities cannot be averaged with the first one's.

    block_size: tokens of a window. own_text: of the text that the first one was trained on, if it
    is scored on that. Raises UserError.
    """
    if Tokenizer.load(other.folder).sha256 != Tokenizer.load(first.folder).sha256:
        raise UserError(
            f"evaluate.model: {first.folder} and {other.folder} have different tokenizers; only "
            "models with the same one can be averaged"
        )
    n_positions = read_shape(other.folder).n_positions
    if n_positions < block_size:
        raise UserError(
            f"evaluate.model: {other.folder} has {n_positions} positions, fewer than the "
            f"{block_size} tokens of a window; set train.block_size={n_positions}"
        )
    if own_text is None or other.run is None:
        return
    trained = with_whole_paths(load_config(str(other.run / CONFIG), []))
    if held_out(trained) != held_out(own_text):
        raise UserError(
            f"evaluate.model: {other.run} was trained on another text or split than {first.run}, "
            "so it may have seen this validation text; evaluate.source=... scores text that none "
            "has seen, and data.seed=1 gives runs of any seed the same split"
        )


def held_out(config: Config) -> dict[str, Any]:
    """What decides which text a run does not train on, by key; its paths from the root on."""
    flat = flatten(config)
    seed = config.seed if config.data.seed is None else config.data.seed
    return {"seed": seed, **{key: flat[f"data.{key}"] for key in _HOLD_OUT}}
