"""Which networks native decoding and CUDA graphs compute: GPT-2's, and no others yet.

Training's kernels compute all of them.
"""

from __future__ import annotations

from gptray.config import ModelConfig, UserError
from gptray.config.keys import shown
from gptray.model.families import GPT2, SHAPE

# Fields of which they know every value.
_OPEN = {*GPT2.keys, "residual"} - {"mlp", "tie_word_embeddings"}


def why_only_torch(config: ModelConfig) -> str | None:
    """Why PyTorch alone computes a network, in a clause; None if the kernels can."""
    gpt2s = {
        "n_kv_head": config.kv_heads == config.n_head,
        "head_dim": config.head_width * config.n_head == config.n_embd,
        "norm": config.norm != "rmsnorm",
    }
    for name in SHAPE:
        value, default = getattr(config, name), ModelConfig.model_fields[name].default
        if not gpt2s.get(name, name in _OPEN or value == default):
            return f"gptray's kernels compute GPT-2's network, not model.{name}={shown(value)}"
    return None


def check_kernels(config: ModelConfig, backend: str, *, key: str) -> str | None:
    """As `why_only_torch`; raises UserError where the config's `key` asks for native by name."""
    why = why_only_torch(config)
    if why and backend == "native":
        raise UserError(f"{key}=native: {why}; {key}=auto takes PyTorch for it")
    return why
