"""The config's `model` section: the network's architecture and the source of its weights.

The defaults are GPT-2's; `gptray.model.families` has those of other families.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gptray.config.limits import MAX_LAYERS
from gptray.config.rope_scaling import BY_PAIR, RopeScaling, known_scaling
from gptray.config.values import NonEmpty, Positive, PositiveInt, Probability, Section, Several

FULL, SLIDING = "full_attention", "sliding_attention"
Width = Annotated[int, Field(gt=0, le=2**24)]


def known_layers(layers: list[str] | None) -> list[str] | None:
    """Check each layer's kind of attention."""
    if layers is not None and not {*layers} <= {FULL, SLIDING}:
        raise ValueError(f"each layer must be {FULL} or {SLIDING}")
    return layers


def known_flags(layers: list[int] | None) -> list[int] | None:
    """Check a list with 1 or 0 for each layer."""
    if layers is not None and not {*layers} <= {0, 1}:
        raise ValueError("each layer must be 1 or 0")
    return layers


class ModelConfig(Section):
    n_layer: Annotated[int, Field(gt=0, le=MAX_LAYERS)] = Field(2, description="blocks")
    n_head: Width = Field(4, description="attention heads; must divide n_embd")
    n_kv_head: Width | None = Field(
        None,
        description="key and value heads, each shared by n_head / n_kv_head query heads; "
        "null: n_head",
    )
    head_dim: Width | None = Field(None, description="width of a head; null: n_embd / n_head")
    n_embd: Width = Field(256, description="width of the residual stream")
    n_inner: Width | None = Field(None, description="width of the MLP; null: 4 x n_embd")
    # A context of one token would have no room for a new one.
    n_positions: Several = Field(128, description="longest context, in tokens")
    vocab_size: PositiveInt | None = Field(
        None,
        description="rows of the embedding; null: the tokenizer's size; a larger number pads it",
    )
    dropout: Probability = Field(
        0.0,
        description="dropout on embeddings, attention and residuals (all three of Hugging Face's)",
    )
    norm: Literal["layernorm", "rmsnorm", "none"] = Field(
        "layernorm", description="rmsnorm: Llama's; none: ablation, no normalisation"
    )
    post_norm: bool = Field(
        False, description="normalise the outputs of attention and MLP (EXAONE 4), not their inputs"
    )
    centred_norm: bool = Field(
        False, description="rmsnorm multiplies by 1 + its weight, which starts at 0 (Gemma)"
    )
    sandwich_norm: bool = Field(
        False, description="normalise inputs and outputs of attention and MLP (Gemma 3)"
    )
    residual: bool = Field(True, description="false: ablation, no skip connections")
    parallel_residual: bool = Field(
        False, description="attention and MLP read the same input (GPT-NeoX)"
    )
    layer_norm_epsilon: Positive = Field(1e-5, description="added to the variance, in every norm")
    positions: Literal["learned", "rotary"] = Field(
        "learned", description="learned: an embedding; rotary: queries and keys are rotated (RoPE)"
    )
    rope_theta: Annotated[float, Field(gt=1.0)] = Field(
        10000.0, description="base of the rotations' wavelengths"
    )
    local_rope_theta: Annotated[float, Field(gt=1.0)] | None = Field(
        None,
        description="rope_theta of layers with a sliding window, which do not use rope_scaling "
        "(Gemma 3); null: the same as the others",
    )
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of each head that is rotated"
    )
    rope_scaling: Annotated[RopeScaling | None, AfterValidator(known_scaling)] = Field(
        None,
        description="stretch positions to longer contexts: rope_type linear, llama3, yarn or "
        "longrope, with the keys of Hugging Face's rope_scaling, such as {rope_type: linear, "
        "factor: 2}; of longrope only the part for short contexts is computed",
    )
    mlp: Literal["gelu_new", "gelu", "relu", "swiglu", "geglu"] = Field(
        "gelu_new",
        description="gelu_new: GPT-2's, by tanh; gelu: exact; relu: OPT's; gated: swiglu (Llama), "
        "geglu (Gemma)",
    )
    attention_scale: Positive | None = Field(
        None,
        description="factor of attention's scores (GPT-Neo: 1; Granite); null: 1 / the square root "
        "of the width of a head",
    )
    qkv_bias: bool = Field(True, description="bias of queries, keys and values")
    attn_out_bias: bool = Field(True, description="bias of attention's output layer")
    mlp_bias: bool = Field(True, description="bias of the MLP's layers")
    qk_norm: bool = Field(
        False, description="RMSNorm of each head's queries and keys (Qwen3, EXAONE 4)"
    )
    wide_qk_norm: bool = Field(
        False, description="qk_norm over all heads together, not each on its own (OLMo 2)"
    )
    sliding_window: PositiveInt | None = Field(
        None,
        description="tokens that attention looks back over, including the current one; null: all",
    )
    layer_types: Annotated[list[str] | None, AfterValidator(known_layers)] = Field(
        None,
        description=f"{FULL} or {SLIDING} for each layer; null: sliding_window applies to all",
    )
    global_rope: bool = Field(
        True, description=f"false: layers of {FULL} have no positions (EXAONE 4)"
    )
    no_rope_layers: Annotated[list[int] | None, AfterValidator(known_flags)] = Field(
        None,
        description="1 for each layer with positions, 0 for one without (SmolLM3); null: all 1",
    )
    scale_embedding: bool = Field(
        False, description="multiply embeddings by the square root of n_embd (Gemma)"
    )
    embedding_multiplier: Positive | None = Field(
        None, description="factor of embeddings (Granite); null: that of scale_embedding, or none"
    )
    residual_multiplier: Positive = Field(
        1.0, description="factor of the outputs of attention and MLP (Granite)"
    )
    logits_scaling: Positive = Field(1.0, description="divisor of the logits (Granite)")
    tie_word_embeddings: bool = Field(
        True, description="share one weight between the embedding and the head"
    )
    initializer_range: Positive = Field(0.02, description="standard deviation of initial weights")
    init_from: NonEmpty | None = Field(
        None,
        description="start from these weights: a run by name or folder, a model folder of GPT-2, "
        "GPT-Neo, OPT, Llama, Mistral, Qwen2, Qwen3, GPT-NeoX, EXAONE 4, OLMo, SmolLM3, Phi-3, "
        "StableLM, Granite, ERNIE 4.5, Gemma or Gemma 3, or a hub id",
    )
    resize_vocab: bool = Field(
        False,
        description="resize init_from's embedding for another tokenizer: rows of tokens that "
        "both have are kept, new ones start from the mean row",
    )
    checkpoint_blocks: bool = Field(
        False,
        description="keep only the input of each block and recompute the block in the backward "
        "pass: less memory for about a third more arithmetic, with the same results",
    )

    @property
    def rows(self) -> int:
        """Rows of the embedding, once they are known: always for a network in a file."""
        assert self.vocab_size
        return self.vocab_size

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def score_scale(self) -> float:
        """The factor of attention's scores."""
        return self.attention_scale or self.head_width**-0.5

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Widths of the norms of queries and of keys."""
        heads = (self.n_head, self.kv_heads) if self.wide_qk_norm else (1, 1)
        return heads[0] * self.head_width, heads[1] * self.head_width

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def embedding_scale(self) -> float:
        """The factor of embeddings."""
        return self.embedding_multiplier or (self.n_embd**0.5 if self.scale_embedding else 1.0)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's first layer makes gates too."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        is_rotary = self.positions == "rotary"
        return int(self.head_width * self.partial_rotary_factor) if is_rotary else 0

    def window(self, layer: int) -> int | None:
        """Tokens that a layer's attention looks back over; None: all."""
        is_full = self.layer_types is not None and self.layer_types[layer] == FULL
        return None if is_full else self.sliding_window

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        is_left_out = self.no_rope_layers is not None and not self.no_rope_layers[layer]
        is_local = self.global_rope or self.window(layer) is not None
        return self.rotary_width > 0 and is_local and not is_left_out

    def broken_rules(self) -> Iterator[str]:
        if self.resize_vocab and self.init_from is None:
            yield "model.resize_vocab=true needs model.init_from"
        if self.head_dim is None and self.n_embd % self.n_head:
            yield (
                f"model.n_embd={self.n_embd} must be divisible by model.n_head={self.n_head}"
                f", such as {max(1, round(self.n_embd / self.n_head)) * self.n_head}"
            )
        if self.n_head % self.kv_heads:
            yield f"model.n_head={self.n_head} must be divisible by model.n_kv_head={self.kv_heads}"
        if self.positions != "rotary":
            scaling = ("partial_rotary_factor", "rope_scaling", "local_rope_theta")
            for key in (*scaling, "global_rope", "no_rope_layers"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield f"model.{key} needs model.positions=rotary"
        elif self.rotary_width < 2 or self.rotary_width % 2:
            yield (
                "model.positions=rotary rotates pairs, so it needs an even part of each head, "
                f"not {self.rotary_width} of {self.head_width} numbers (model.head_dim, "
                "model.partial_rotary_factor)"
            )
        for key in ("layer_types", "no_rope_layers"):
            each: list[object] | None = getattr(self, key)
            if each is not None and len(each) != self.n_layer:
                yield f"model.{key} has {len(each)} entries for model.n_layer={self.n_layer}"
        if SLIDING in (self.layer_types or ()) and self.sliding_window is None:
            yield f"model.layer_types has {SLIDING}; set model.sliding_window too"
        if self.centred_norm and self.norm != "rmsnorm":
            yield "model.centred_norm needs model.norm=rmsnorm"
        if self.attention_scale and self.qk_norm:
            yield "model.attention_scale does not go with model.qk_norm, whose weights scale too"
        if self.wide_qk_norm and not self.qk_norm:
            yield "model.wide_qk_norm needs model.qk_norm=true"
        if self.embedding_multiplier and self.scale_embedding:
            yield "model.embedding_multiplier replaces model.scale_embedding; set one of them"
        if self.residual_multiplier != 1 and (self.post_norm or self.sandwich_norm):
            yield (
                "model.residual_multiplier has no place with norms of outputs (model.post_norm, "
                "model.sandwich_norm)"
            )
        if self.logits_scaling != 1 and self.norm == "none":
            yield "model.logits_scaling needs a norm (model.norm)"
        if self.post_norm and self.sandwich_norm:
            yield "model.sandwich_norm includes model.post_norm; set one of them"
        yield from self._broken_longrope()

    def _broken_longrope(self) -> Iterator[str]:
        scaling = self.rope_scaling or {}
        for key in BY_PAIR:
            each = scaling.get(key)
            if isinstance(each, list) and len(each) != self.rotary_width // 2:
                yield (
                    f"model.rope_scaling's {key} has {len(each)} numbers for "
                    f"{self.rotary_width // 2} pairs"
                )
        most = scaling["original_max_position_embeddings"] if "short_factor" in scaling else None
        if isinstance(most, (int, float)) and self.n_positions > most:
            yield (
                f"model.n_positions={self.n_positions} is more than the {most:g} for which "
                "rope_type longrope is computed here"
            )
