"""GGUF's names for the weights and numbers of each model family, for reading and writing.

The names are those of llama.cpp. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import replace

from gptray.gguf.naming import Family

HEAD, EMBEDDING = "output.weight", "token_embd.weight"

_GPT2 = Family(
    model_type="gpt2",
    architecture="gpt2",
    numbers={
        "n_positions": "context_length",
        "n_embd": "embedding_length",
        "n_inner": "feed_forward_length",
        "n_layer": "block_count",
        "n_head": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    },
    layers="transformer.h.",
    names={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    in_block={
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    biased=("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    whole=("transformer.wpe",),
    is_rotary=False,
)
_SHARED_NUMBERS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(
    model_type="llama",
    architecture="llama",
    numbers=_SHARED_NUMBERS
    | {
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    },
    layers="model.layers.",
    names={"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    in_block={
        "input_layernorm": "attn_norm",
        **dict(zip(_QKV, ("attn_q", "attn_k", "attn_v"), strict=True)),
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    biased=(*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    rotated={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
    },
    scalings=("linear", "yarn", "llama3"),
    biases={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
)
_QWEN2 = replace(
    _LLAMA,
    model_type="qwen2",
    architecture="qwen2",
    biased=_QKV,
    rotated={},
    scalings=("linear", "yarn"),
)
_NORMED = {
    **_LLAMA.in_block,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_EXAONE4 = replace(
    _LLAMA,
    model_type="exaone4",
    architecture="exaone4",
    optional={"sliding_window": "attention.sliding_window"},
    in_block={
        **{name: one for name, one in _NORMED.items() if name != "input_layernorm"},
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    biased=(),
    rotated={},
)
_GEMMA = replace(
    _QWEN2, model_type="gemma", architecture="gemma", biased=(), is_centred=True, is_tied=True
)

# Files of an architecture are read as its first family.
FAMILIES = (
    _GPT2,
    _LLAMA,
    replace(_LLAMA, model_type="mistral"),
    _QWEN2,
    replace(_QWEN2, model_type="qwen3", architecture="qwen3", in_block=_NORMED, biased=()),
    Family(
        model_type="gpt_neox",
        architecture="gptneox",
        numbers=_SHARED_NUMBERS
        | {
            "layer_norm_eps": "attention.layer_norm_epsilon",
            "use_parallel_residual": "use_parallel_residual",
        },
        layers="gpt_neox.layers.",
        names={
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "lm_head": "output",
        },
        in_block={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        biased=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")
        + ("mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm"),
        by_head=("attention.query_key_value",),
        is_strict=True,
        needs_head=True,
    ),
    # llama.cpp leaves out the positions of every fourth layer; so does a config.json without
    # no_rope_layers.
    replace(
        _LLAMA, model_type="smollm3", architecture="smollm3", biased=(), scalings=("linear", "yarn")
    ),
    replace(
        _LLAMA,
        model_type="granite",
        architecture="granite",
        numbers={
            **_LLAMA.numbers,
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    replace(_QWEN2, model_type="ernie4_5", architecture="ernie4_5", biased=()),
    _EXAONE4,
    replace(
        _EXAONE4, model_type="olmo2", architecture="olmo2", optional={}, scalings=_QWEN2.scalings
    ),
    replace(
        _LLAMA,
        model_type="phi3",
        architecture="phi3",
        numbers={key: name for key, name in _LLAMA.numbers.items() if key != "head_dim"},
        optional={"sliding_window": "attention.sliding_window"},
        in_block={
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        biased=(),
        rotated={},
        scalings=("longrope",),
    ),
    replace(
        _GEMMA,
        model_type="gemma3_text",
        architecture="gemma3",
        numbers={**_LLAMA.numbers, "query_pre_attn_scalar": "attention.key_length"},
        optional={
            "sliding_window": "attention.sliding_window",
            "sliding_window_pattern": "attention.sliding_window_pattern",
            "rope_local_base_freq": "rope.freq_base_swa",
        },
        in_block={
            **_NORMED,
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        scalings=("linear",),
        pattern=6,
        is_tied=False,
    ),
    _GEMMA,
    replace(
        _QWEN2,
        model_type="stablelm",
        architecture="stablelm",
        numbers=_SHARED_NUMBERS
        | {
            "num_key_value_heads": "attention.head_count_kv",
            "layer_norm_eps": "attention.layer_norm_epsilon",
        },
        biased=(*_QKV, "input_layernorm", "post_attention_layernorm"),
        needs_head=True,
        biases={"use_qkv_bias": "blk.0.attn_q.bias"},
    ),
)
ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES))
