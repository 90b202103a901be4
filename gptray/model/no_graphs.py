"""Says which networks CUDA graphs can run: only GPT-2's so far."""

from __future__ import annotations

from gptray.config import ModelConfig
from gptray.config.keys import shown
from gptray.model.families import GPT2, SHAPE

# Fields of which CUDA graphs support every value.
_OPEN = {*GPT2.keys, "residual"} - {"mlp", "tie_word_embeddings"}


def why_no_graphs(config: ModelConfig) -> str | None:
    """Why CUDA graphs cannot generate with a network, as a clause; None if they can."""
    as_gpt2 = {
        "n_kv_head": config.kv_heads == config.n_head,
        "head_dim": config.head_width * config.n_head == config.n_embd,
        "norm": config.norm != "rmsnorm",
    }
    for name in SHAPE:
        value, default = getattr(config, name), ModelConfig.model_fields[name].default
        if not as_gpt2.get(name, name in _OPEN or value == default):
            return f"gptray's CUDA graphs compute GPT-2's network, not model.{name}={shown(value)}"
    return None
