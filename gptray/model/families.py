"""How each model family writes a network: the keys of its config.json and the names of its weights.

A family is a row of the table below; `gptray.model.hf_config` and `gptray.model.parameters` read
and write all families in the same way. Names and defaults are those of the classes in Hugging
Face's transformers.
"""

from __future__ import annotations

from dataclasses import replace

from gptray.config import ModelConfig
from gptray.model.family import Family, Key
from gptray.model.llama_families import (
    ERNIE45,
    EXAONE4,
    GEMMA,
    GEMMA3,
    GRANITE,
    LLAMA,
    MISTRAL,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STABLELM,
)

_GELU = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
_EXACT = {"gelu": "gelu", "gelu_python": "gelu"}
_ACTIVATIONS = {**_GELU, **_EXACT}

# `gptray.model.parameters` uses GPT-2's names.
_MODULES = (
    "wte", "wpe", "ln_f", "ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": Key("vocab_size", 50257),
        "n_positions": Key("n_positions", 1024),
        "n_embd": Key("n_embd", 768),
        "n_layer": Key("n_layer", 12),
        "n_head": Key("n_head", 12),
        "n_inner": Key("n_inner", None),
        "layer_norm_epsilon": Key("layer_norm_epsilon", 1e-5),
        "initializer_range": Key("initializer_range", 0.02),
        "dropout": Key("resid_pdrop", 0.1, also=("embd_pdrop", "attn_pdrop")),
        "mlp": Key("activation_function", "gelu_new", words=_ACTIVATIONS),
        "tie_word_embeddings": Key("tie_word_embeddings", True),
    },
    always={},
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    modules={name: (name,) for name in _MODULES},
    prefix="transformer.",
    layers="h.",
    transposed=True,
)
GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    keys={
        "vocab_size": Key("vocab_size", 50432),
        "n_positions": Key("max_position_embeddings", 2048),
        "n_embd": Key("hidden_size", 6144),
        "n_layer": Key("num_hidden_layers", 44),
        "n_head": Key("num_attention_heads", 64),
        "n_inner": Key("intermediate_size", 24576),
        "layer_norm_epsilon": Key("layer_norm_eps", 1e-5),
        "initializer_range": Key("initializer_range", 0.02),
        "dropout": Key("hidden_dropout", 0.0, also=("attention_dropout",)),
        "mlp": Key("hidden_act", "gelu", words=_ACTIVATIONS),
        "qkv_bias": Key("attention_bias", True),
        "attn_out_bias": Key("attention_bias", True),
        "parallel_residual": Key("use_parallel_residual", True),
        "tie_word_embeddings": Key("tie_word_embeddings", False),
    },
    always={"positions": "rotary"},
    modules={
        "wte": ("embed_in",),
        "ln_f": ("final_layer_norm",),
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
        "attn.c_attn": ("attention.query_key_value",),
        "attn.c_proj": ("attention.dense",),
        "mlp.c_fc": ("mlp.dense_h_to_4h",),
        "mlp.c_proj": ("mlp.dense_4h_to_h",),
    },
    prefix="gpt_neox.",
    layers="layers.",
    rope_base=Key("rotary_emb_base", 10000.0),
    rope_part=Key("rotary_pct", 0.25),
    by_head=True,
)

GPT_NEO = Family(
    architecture="GPTNeoForCausalLM",
    keys={
        "vocab_size": Key("vocab_size", 50257),
        "n_positions": Key("max_position_embeddings", 2048),
        "n_embd": Key("hidden_size", 2048),
        "n_layer": Key("num_layers", 24),
        "n_head": Key("num_heads", 16),
        "n_inner": Key("intermediate_size", None),
        "layer_norm_epsilon": Key("layer_norm_epsilon", 1e-5),
        "initializer_range": Key("initializer_range", 0.02),
        "dropout": Key("resid_dropout", 0.0, also=("embed_dropout", "attention_dropout")),
        "mlp": Key("activation_function", "gelu_new", words=_ACTIVATIONS),
        "tie_word_embeddings": Key("tie_word_embeddings", True),
    },
    always={"attention_scale": 1.0, "qkv_bias": False},
    modules={name: (name,) for name in _MODULES}
    | {
        "attn.c_attn": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
        "attn.c_proj": ("attn.attention.out_proj",),
    },
    prefix="transformer.",
    layers="h.",
    windows="by type",
    window=256,
    even_heads=True,
)
OPT = Family(
    architecture="OPTForCausalLM",
    keys={
        "vocab_size": Key("vocab_size", 50272),
        "n_positions": Key("max_position_embeddings", 2048),
        "n_embd": Key("hidden_size", 768),
        "n_layer": Key("num_hidden_layers", 12),
        "n_head": Key("num_attention_heads", 12),
        "n_inner": Key("ffn_dim", 3072),
        "initializer_range": Key("init_std", 0.02),
        "dropout": Key("dropout", 0.1, also=("attention_dropout",)),
        "mlp": Key("activation_function", "relu", words={"relu": "relu", **_ACTIVATIONS}),
        **dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), Key("enable_bias", True)),
        "tie_word_embeddings": Key("tie_word_embeddings", True),
    },
    always={"layer_norm_epsilon": 1e-5},
    fixed={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    modules={
        "wte": ("decoder.embed_tokens",),
        "wpe": ("decoder.embed_positions",),
        "ln_f": ("decoder.final_layer_norm",),
        "ln_1": ("self_attn_layer_norm",),
        "ln_2": ("final_layer_norm",),
        "attn.c_attn": tuple(f"self_attn.{part}_proj" for part in "qkv"),
        "attn.c_proj": ("self_attn.out_proj",),
        "mlp.c_fc": ("fc1",),
        "mlp.c_proj": ("fc2",),
    },
    prefix="model.",  # old files omit it
    layers="decoder.layers.",
    equal=(Key("word_embed_proj_dim", None), "n_embd", "hidden_size"),
    first_position=2,
    even_heads=True,
)

# By model_type, in the order in which `family_of` tries them.
KNOWN: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt_neox": GPT_NEOX,
    "exaone4": EXAONE4,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "gemma3_text": GEMMA3,
    "gpt_neo": GPT_NEO,
    "opt": OPT,
    "gemma": GEMMA,
    "stablelm": STABLELM,
    "granite": GRANITE,
    "ernie4_5": ERNIE45,
}


def _ablation(**fields: object) -> Family:
    """GPT-2's weights under another model_type, because GPT-2's classes would compute with norms
    and skip connections."""
    return replace(GPT2, architecture=None, always=fields)


# The fields of ModelConfig that define a network.
SHAPE = tuple(
    name
    for name in ModelConfig.model_fields
    if name not in ("vocab_size", "init_from", "resize_vocab", "checkpoint_blocks")
)
# Any other combination of fields, under the names of ModelConfig.
OWN = "gptray"
_OWN_MODULES = (*_MODULES, "ln_1_out", "ln_2_out", "attn.q_norm", "attn.k_norm")
_OWN = Family(
    architecture=None,
    keys={"vocab_size": Key("vocab_size", None)}
    | {name: Key(name, ModelConfig.model_fields[name].default) for name in SHAPE},
    always={},
    modules={name: (name,) for name in _OWN_MODULES},
    prefix="transformer.",
    layers="h.",
)
FAMILIES: dict[str, Family] = KNOWN | {
    "gptray-gpt2-nonorm": _ablation(norm="none"),
    "gptray-gpt2-noresidual": _ablation(residual=False),
    "gptray-gpt2-nonorm-noresidual": _ablation(norm="none", residual=False),
    OWN: _OWN,
}
