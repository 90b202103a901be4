"""Models as transformers makes them: every family in odd shapes, with random weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_GPT2 = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 96, "initializer_range": 0.2}
_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_NEOX = _SHAPE | {"num_attention_heads": 3}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 700.0, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2, 3.0], "long_factor": [2.0, 4.0, 9, 30.0],
}  # fmt: skip
_OPT = {
    "hidden_size": 48, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 96, "init_std": 0.1,
}  # fmt: skip
_BY_LAYER = ["sliding_attention", "full_attention"]

# By name, which begins with the model_type: transformers' class but for its ending, its config.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2 untied, exact GELU": (
        "GPT2",
        _GPT2 | {"activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "llama": ("Llama", _GROUPED),
    "llama with biases": (
        "Llama",
        _SHAPE | {"num_key_value_heads": 3, "head_dim": 12, "attention_bias": True,
                  "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama of release 3": (
        "Llama", _SHAPE | {"num_key_value_heads": 1, "rope_parameters": _LLAMA3},
    ),
    "llama, linear": ("Llama", _SHAPE | {"rope_parameters": _LINEAR}),
    "llama, YaRN": ("Llama", _SHAPE | {"rope_parameters": _YARN}),
    "mistral": ("Mistral", _GROUPED | {"head_dim": 10, "sliding_window": 7}),
    "qwen2": ("Qwen2", _GROUPED | {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoX", _NEOX),
    "gpt_neox in series": (
        "GPTNeoX",
        _NEOX | {"rotary_pct": 0.5, "use_parallel_residual": False, "attention_bias": False,
                 "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
    "exaone4": ("Exaone4", _GROUPED | {"sliding_window": 5, "layer_types": _BY_LAYER}),
    "exaone4 without windows": (
        "Exaone4",
        _GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": (
        "Olmo3",
        _GROUPED | {"num_hidden_layers": 4, "sliding_window": 6,
                    "rope_parameters": {"full_attention": _YARN | {"rope_theta": 90.0},
                                        "sliding_attention": {"rope_theta": 500000.0}}},
    ),
    "olmo2 with biases": (
        "Olmo2", _SHAPE | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "smollm3": ("SmolLM3", _GROUPED | {"num_hidden_layers": 4}),
    "smollm3, its first layer without positions": (
        "SmolLM3",
        _SHAPE | {"num_key_value_heads": 3, "no_rope_layers": [0, 1], "mlp_bias": True,
                  "tie_word_embeddings": False},
    ),
    "phi3": (
        "Phi3",
        _GROUPED | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
                    "sliding_window": 11},
    ),
    "phi3, LongRoPE": (
        "Phi3",
        _GROUPED | {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True,
                    "max_position_embeddings": 900, "original_max_position_embeddings": 96,
                    "rope_parameters": _LONGROPE},
    ),
}  # fmt: skip
SHAPES |= {
    "gemma3_text": (
        "Gemma3Text",
        _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5,
                    "layer_types": _BY_LAYER,
                    "rope_parameters": {"full_attention": _LINEAR,
                                        "sliding_attention": {"rope_theta": 50.0}}},
    ),
    "gemma3_text, six layers": (
        "Gemma3Text",
        _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7,
                    "num_hidden_layers": 6},
    ),
}  # fmt: skip
SHAPES |= {
    "gpt_neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 3, "hidden_size": 48, "max_position_embeddings": 96,
         "attention_types": [[["global", "local"], 1]], "window_size": 7, "initializer_range": 0.1},
    ),
    "gpt_neo without windows, exact GELU": (
        "GPTNeo",
        {"num_layers": 3, "num_heads": 4, "hidden_size": 48, "max_position_embeddings": 96,
         "attention_types": [[["global"], 3]], "intermediate_size": 56, "initializer_range": 0.1,
         "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    # Networks that Llama has too.
    "mistral without windows": ("Mistral", _GROUPED | {"sliding_window": None}),
    "phi3 without LongRoPE": ("Phi3", _GROUPED | {"sliding_window": None}),
    "gemma": ("Gemma", _GROUPED | {"head_dim": 16}),
    "gemma with biases": (
        "Gemma",
        _SHAPE | {"num_key_value_heads": 1, "head_dim": 10, "attention_bias": True,
                  "tie_word_embeddings": False},
    ),
    "stablelm": (
        "StableLm",
        _GROUPED | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
                    "use_qkv_bias": True},
    ),
    "stablelm, tied": (
        "StableLm",
        _NEOX | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "granite": (
        "Granite",
        _GROUPED | {"embedding_multiplier": 12.0, "attention_multiplier": 0.09,
                    "residual_multiplier": 0.22, "logits_scaling": 8.0,
                    "tie_word_embeddings": True},
    ),
    "granite with biases": (
        "Granite",
        _SHAPE | {"attention_multiplier": 0.25, "residual_multiplier": 1.5, "logits_scaling": 3,
                  "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "ernie4_5": ("Ernie4_5", _GROUPED | {"head_dim": 12}),
    "ernie4_5 with biases": (
        "Ernie4_5",
        _SHAPE | {"num_key_value_heads": 6, "head_dim": 8, "use_bias": True,
                  "tie_word_embeddings": False},
    ),
    "opt": ("OPT", _OPT),
    "opt untied, without biases": (
        "OPT", _OPT | {"enable_bias": False, "tie_word_embeddings": False},
    ),
}  # fmt: skip
# Choices that no family has together.
MIXES: list[dict[str, object]] = [
    {"norm": "rmsnorm", "n_kv_head": 2, "tie_word_embeddings": False},
    {"mlp": "swiglu", "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False},
    {"positions": "rotary", "partial_rotary_factor": 0.5, "norm": "none", "qk_norm": True},
    {
        "positions": "rotary",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "qk_norm": True,
    },
    {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    {"positions": "rotary", "attention_scale": 0.7, "n_kv_head": 2},
    {
        "positions": "rotary",
        "local_rope_theta": 50.0,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    {"qk_norm": True, "wide_qk_norm": True, "n_kv_head": 2},
    {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    {
        "norm": "rmsnorm",
        "centred_norm": True,
        "sandwich_norm": True,
        "mlp": "geglu",
        "scale_embedding": True,
        "qk_norm": True,
    },
    {"post_norm": True, "parallel_residual": True, "residual": False, "head_dim": 6},
]
# One of each family.
FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "exaone4"]
FAMILIES += [
    "olmo2",
    "olmo3",
    "smollm3",
    "phi3",
    "gemma3_text",
    "gpt_neo",
    "opt",
    "gemma",
    "stablelm",
    "granite",
    "ernie4_5",
]


@torch.no_grad()
def make_hf(name: str, vocab_size: int, *, eos_id: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose every weight matters."""
    kind, fields = SHAPES[name]
    ids = {"vocab_size": vocab_size, "bos_token_id": eos_id, "eos_token_id": eos_id}
    none = {"pad_token_id": None}  # some classes have one beyond so few tokens
    given = deepcopy({**fields, **ids, **none, **changes})  # classes write into what is in it
    config = getattr(transformers, f"{kind}Config")(**given)
    torch.manual_seed(1)
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    name_of_class = kind.removesuffix("Text") + ending
    model: PreTrainedModel = getattr(transformers, name_of_class)(config)
    model.train(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model
