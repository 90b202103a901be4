"""Rows of `gptray.model.families`: Llama, and the families that are variations of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptray.model.family import Family, Key

_LLAMA_KEYS = {
    "vocab_size": Key("vocab_size", 32000),
    "n_positions": Key("max_position_embeddings", 2048),
    "n_embd": Key("hidden_size", 4096),
    "n_layer": Key("num_hidden_layers", 32),
    "n_head": Key("num_attention_heads", 32),
    "n_kv_head": Key("num_key_value_heads", None),
    "head_dim": Key("head_dim", None),
    "n_inner": Key("intermediate_size", 11008),
    "layer_norm_epsilon": Key("rms_norm_eps", 1e-6),
    "initializer_range": Key("initializer_range", 0.02),
    "dropout": Key("attention_dropout", 0.0),
    "mlp": Key("hidden_act", "silu", words={"silu": "swiglu"}),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
}
_PLAIN_BIASES: dict[str, object] = {"qkv_bias": False, "attn_out_bias": False, "mlp_bias": False}
# Of families whose heads divide the width, and which so have no head_dim.
_WHOLE_HEADS = {name: key for name, key in _LLAMA_KEYS.items() if name != "head_dim"}
_ATTENTION_BIAS = {name: Key("attention_bias", False) for name in ("qkv_bias", "attn_out_bias")}
_RMS_ROTARY: dict[str, object] = {"norm": "rmsnorm", "positions": "rotary"}
_LLAMA_MODULES: dict[str, tuple[str, ...]] = {
    "wte": ("embed_tokens",),
    "ln_f": ("norm",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def _keys(keys: Mapping[str, Key] = _LLAMA_KEYS, **defaults: object) -> dict[str, Key]:
    """The keys, some with other defaults."""
    return {**keys, **{name: replace(keys[name], default=one) for name, one in defaults.items()}}


LLAMA = Family(
    architecture="LlamaForCausalLM",
    keys=_LLAMA_KEYS | _ATTENTION_BIAS | {"mlp_bias": Key("mlp_bias", False)},
    always=_RMS_ROTARY,
    modules=_LLAMA_MODULES,
    prefix="model.",
    layers="layers.",
    even_heads=True,
)

MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    keys=_keys(n_positions=4096 * 32, n_kv_head=8, n_inner=14336),
    always=_RMS_ROTARY | _PLAIN_BIASES,
    windows="all",
    even_heads=False,
)

QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    keys=_keys(vocab_size=151936, n_positions=32768, n_kv_head=32, n_inner=22016),
    always=_RMS_ROTARY | _PLAIN_BIASES | {"qkv_bias": True},
    windows="from a layer",
    even_heads=False,
)

QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    keys=_keys(QWEN2.keys, head_dim=128) | _ATTENTION_BIAS,
    always=_RMS_ROTARY | {"mlp_bias": False, "qk_norm": True},
)

EXAONE4 = replace(
    LLAMA,
    architecture="Exaone4ForCausalLM",
    keys=_keys(vocab_size=102400, n_kv_head=32, n_inner=16384, layer_norm_epsilon=1e-5),
    always=_RMS_ROTARY | _PLAIN_BIASES | {"qk_norm": True, "post_norm": True},
    modules=_LLAMA_MODULES
    | {"ln_1": ("post_attention_layernorm",), "ln_2": ("post_feedforward_layernorm",)},
    windows="by layer",
    global_rope=False,
    even_heads=False,
)

OLMO2 = replace(
    EXAONE4,
    architecture="Olmo2ForCausalLM",
    keys=_keys(vocab_size=50304, layer_norm_epsilon=1e-5) | _ATTENTION_BIAS,
    always=_RMS_ROTARY
    | {"mlp_bias": False, **dict.fromkeys(("qk_norm", "wide_qk_norm", "post_norm"), True)},
    windows="none",
    global_rope=True,
)

# Files without rope_parameters have no key for the base of layers with a window.
OLMO3 = replace(
    OLMO2,
    architecture="Olmo3ForCausalLM",
    windows="by layer",
    rope_base=Key("rope_theta", 500000.0),
    local_base=Key("", 500000.0),
)

SMOLLM3 = replace(
    LLAMA,
    architecture="SmolLM3ForCausalLM",
    keys=_keys(
        LLAMA.keys,
        vocab_size=128256,
        n_positions=32768,
        n_embd=2048,
        n_layer=36,
        n_head=16,
        n_kv_head=4,
        tie_word_embeddings=True,
    )
    | {"no_rope_layers": Key("no_rope_layers", None)},
    fixed={"use_sliding_window": (False,)},
    rope_base=Key("rope_theta", 2000000.0),
    unrotated=Key("no_rope_layer_interval", 4),
    even_heads=False,
)

PHI3 = replace(
    MISTRAL,
    architecture="Phi3ForCausalLM",
    keys=_keys(
        _WHOLE_HEADS,
        vocab_size=32064,
        n_positions=4096,
        n_embd=3072,
        n_inner=8192,
        layer_norm_epsilon=1e-5,
    )
    | {"dropout": Key("resid_pdrop", 0.0, also=("embd_pdrop", "attention_dropout"))},
    modules=_LLAMA_MODULES
    | {"attn.c_attn": ("self_attn.qkv_proj",), "mlp.c_fc": ("mlp.gate_up_proj",)},
    window=None,
    rope_part=Key("partial_rotary_factor", 1.0),
    scalings=("longrope",),
)

ERNIE45 = replace(
    LLAMA,
    architecture="Ernie4_5ForCausalLM",
    keys=_keys(
        vocab_size=103424,
        n_positions=131072,
        n_embd=1024,
        n_layer=18,
        n_head=16,
        n_kv_head=2,
        head_dim=128,
        n_inner=3072,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    | dict.fromkeys(_PLAIN_BIASES, Key("use_bias", False)),
    rope_base=Key("rope_theta", 500000.0),
    by_pair=True,
    even_heads=False,
)

GRANITE = replace(
    LLAMA,
    architecture="GraniteForCausalLM",
    keys={
        **LLAMA.keys,
        "attention_scale": Key("attention_multiplier", 1.0),
        "embedding_multiplier": Key("embedding_multiplier", 1.0),
        "residual_multiplier": Key("residual_multiplier", 1.0),
        "logits_scaling": Key("logits_scaling", 1.0),
    },
)

STABLELM = replace(
    LLAMA,
    architecture="StableLmForCausalLM",
    keys=_keys(
        _WHOLE_HEADS,
        vocab_size=50304,
        n_positions=4096,
        n_embd=2560,
        n_kv_head=32,
        n_inner=6912,
    )
    | {
        "layer_norm_epsilon": Key("layer_norm_eps", 1e-5),
        "dropout": Key("hidden_dropout", 0.0, also=("attention_dropout",)),
        "qkv_bias": Key("use_qkv_bias", False),
    },
    always={"positions": "rotary", "attn_out_bias": False, "mlp_bias": False},
    fixed={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
    rope_part=Key("partial_rotary_factor", 0.25),
)

_GEMMA: dict[str, object] = {
    **_RMS_ROTARY,
    "mlp_bias": False,
    **dict.fromkeys(("centred_norm", "scale_embedding"), True),
}
GEMMA = replace(
    LLAMA,
    architecture="GemmaForCausalLM",
    keys=_keys(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        vocab_size=256000,
        n_positions=8192,
        n_embd=3072,
        n_layer=28,
        n_head=16,
        n_kv_head=16,
        head_dim=256,
        n_inner=24576,
        tie_word_embeddings=True,
    )
    | {
        # Its first files say gelu and mean GELU by tanh.
        "mlp": Key(
            "hidden_act",
            "gelu_pytorch_tanh",
            words=dict.fromkeys(("gelu_pytorch_tanh", "gelu"), "geglu"),
        ),
    },
    always=_GEMMA,
    fixed={"use_bidirectional_attention": (False, None)},
    even_heads=False,
)

GEMMA3 = replace(
    LLAMA,
    architecture="Gemma3ForCausalLM",
    keys=_keys(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        vocab_size=262208,
        n_positions=131072,
        n_embd=2304,
        n_layer=26,
        n_head=8,
        n_kv_head=4,
        head_dim=256,
        n_inner=9216,
        tie_word_embeddings=True,
    )
    | {"mlp": Key("hidden_activation", "gelu_pytorch_tanh", words={"gelu_pytorch_tanh": "geglu"})},
    always=_GEMMA | {"qk_norm": True, "sandwich_norm": True},
    fixed={
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    modules=_LLAMA_MODULES
    | {
        "ln_1_out": ("post_attention_layernorm",),
        "ln_2": ("pre_feedforward_layernorm",),
        "ln_2_out": ("post_feedforward_layernorm",),
    },
    windows="by layer",
    pattern=6,
    rope_base=Key("rope_theta", 1000000.0),
    local_base=Key("rope_local_base_freq", 10000.0),
    equal=(Key("query_pre_attn_scalar", 256), "head_width", "a head"),
)
