"""A GPT with its weights packed for generation, in the dtype that it computes in.

Shapes: N tokens, C = n_embd, H heads, K heads of keys and values, E = head width, V the vocabulary,
padded to a whole number of the sampler's chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, count
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.generation import gpu_kernels
from gptray.generation.adapted_rows import LAYERS, Layer, RunLayer, output_factors, run_plain
from gptray.generation.choosing import CHUNK
from gptray.generation.product_timing import choose_kernels
from gptray.generation.products import Product, product
from gptray.generation.queries import Queries
from gptray.model.attention import Attention
from gptray.model.gpt import GPT, Block
from gptray.model.importance import input_importance
from gptray.model.layers import Linear, RMSNorm, activation, rms_norm
from gptray.model.quantized import head_kind
from gptray.model.rotary import Angles

# From a layer's number, its q, k, v, (N, (H + 2 K) E), and what prepares them for scores, to what
# it attended to, (N, H E).
Attend = Callable[[int, Tensor, Queries, Angles | None], Tensor]
# `GPT.full_tensor`
FullTensor = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class PackedGPT:
    """The network but for attention, which depends on where keys and values are kept.

    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head. rows: of
    a step in which no prompt is read; on a GPU kernels are chosen for them. fused: norms and gates
    by `gptray.generation.gpu_kernels`.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        rows: int,
        quantize: str = "none",
        fused: bool = False,
    ) -> None:
        transformer = model.transformer
        self.vocab_size, self.dtype = model.valid_vocab_size, dtype
        self._scale = model.config.embedding_scale
        config, full = model.config, model.full_tensor
        wte = full(transformer.wte.weight)
        self._rotary = transformer.rotary
        # First, since the padded copy that it packs is the largest.
        weight = wte if model.lm_head is None else full(model.head)
        head = F.pad(weight[: self.vocab_size], (0, 0, 0, -self.vocab_size % CHUNK))
        self._head = product(head, None, dtype, quantized=head_kind(quantize))
        del weight, head
        # A sum with positions is rounded once.
        self._wte = wte.to(dtype) if self._rotary else wte
        self._wpe = None if self._rotary else full(transformer.wpe.weight)
        del wte
        importance = input_importance(model, quantize)
        packed = partial(_Block, quantize=quantize, importance=importance, fused=fused)
        self._blocks = [
            packed(cast(Block, block), layer, config, full, dtype)
            for layer, block in enumerate(transformer.h)
        ]
        # What divides the logits is in the norm before the head.
        scale = 1 / config.logits_scaling
        self._ln_f = _norm(transformer.ln_f, full, dtype, fused=fused, scale=scale)
        choose_kernels(
            [self._head, *chain.from_iterable(one.products for one in self._blocks)], rows
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._wte.device

    def hidden(
        self, tokens: Tensor, positions: Tensor, attend: Attend, run: RunLayer = run_plain
    ) -> Tensor:
        """What the last block gives for N tokens at their positions, (N, C)."""
        x, angles = F.embedding(tokens, self._wte), list[Angles | None]()
        if self._scale != 1:
            x = x * self._scale
        if self._rotary:
            angles += self._rotary.at(positions, self.dtype)
        if self._wpe is not None:
            angles += [None] * len(self._blocks)
            x = x + F.embedding(positions, self._wpe)
        x = x.to(self.dtype)
        for layer, (block, own) in enumerate(zip(self._blocks, angles, strict=True)):
            x = block(x, own, partial(attend, layer), run)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) in `dtype`; -inf where V is padded."""
        logits = self._head(self._ln_f(hidden))
        logits[:, self.vocab_size :] = float("-inf")
        return logits


class _Block:
    """A block's layers, packed; `after_attn` and `after_mlp` come before what they give is added.

    quantize, importance: for its layers' weights, see `product`. fused: see `PackedGPT`.
    """

    def __init__(
        self,
        block: Block,
        layer: int,
        config: ModelConfig,
        full: FullTensor,
        dtype: torch.dtype,
        *,
        quantize: str,
        importance: Mapping[str, Tensor],
        fused: bool,
    ) -> None:
        modules = block.named_modules(prefix=f"transformer.h.{layer}")
        counts = {module: importance.get(f"{name}.weight") for name, module in modules}
        numbers = count(layer * len(LAYERS))

        def packed(name: str, kind: str | None = None) -> Layer:
            # A Linear, or in training what stands for one: LoRALinear.
            layer, factors = cast(Linear, block.get_submodule(name)), output_factors(name, config)
            weight, bias = full(layer.weight), None if layer.bias is None else full(layer.bias)
            if factors is not None:
                factors = factors.to(weight.device)
                bias = None if bias is None else bias * factors
            made = product(
                *(weight, bias, dtype),
                quantized=quantize,
                importance=counts[layer],
                factors=factors,
                kind=kind,
            )
            return Layer(next(numbers), made)

        norms = [_norm(norm, full, dtype, fused=fused) for norm in block.norms]
        self.before_attn, self.after_attn, self.before_mlp, self.after_mlp = norms
        self.c_attn = packed("attn.c_attn")
        self.queries = _queries(block.attn, config, full, dtype)
        self.attn_proj = packed("attn.c_proj")
        # Adapters add to what goes into an activation, on GPUs in place: there it comes by itself.
        is_apart = fused or config.is_gated
        self.c_fc = packed("mlp.c_fc", None if is_apart else config.mlp)
        self.mlp_proj = packed("mlp.c_proj")
        act = gpu_kernels.gated if fused and config.is_gated else activation
        self.activate = partial(act, kind=config.mlp) if is_apart else None
        self.residual, self.parallel = config.residual, config.parallel_residual

    @property
    def products(self) -> list[Product]:
        layers = self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj
        return [layer.product for layer in layers]

    def __call__(
        self,
        x: Tensor,
        angles: Angles | None,
        attend: Callable[[Tensor, Queries, Angles | None], Tensor],
        run: RunLayer,
    ) -> Tensor:
        attended = attend(run(self.c_attn, self.before_attn(x)), self.queries, angles)
        y = self._add(run, self.attn_proj, attended, self.after_attn, x if self.residual else None)
        inner = run(self.c_fc, self.before_mlp(x if self.parallel else y))
        if self.activate:
            inner = self.activate(inner)
        to = y if self.residual or self.parallel else None
        return self._add(run, self.mlp_proj, inner, self.after_mlp, to)

    def _add(
        self, run: RunLayer, proj: Layer, inner: Tensor, norm: Norm, to: Tensor | None
    ) -> Tensor:
        if norm is _same:
            return run(proj, inner, to)
        made = norm(run(proj, inner))
        return made if to is None else to + made


def _same(x: Tensor) -> Tensor:
    return x


def _norm(
    module: nn.Module, full: FullTensor, dtype: torch.dtype, *, fused: bool, scale: float = 1.0
) -> Norm:
    """The norm, its outputs times `scale`."""
    if isinstance(module, nn.Identity):
        return _same
    if isinstance(module, RMSNorm):
        norm = gpu_kernels.rms_norm if fused else rms_norm
        return partial(norm, weight=(_factors(module, full) * scale).to(dtype), eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    weight, bias = ((full(one) * scale).to(dtype) for one in (module.weight, module.bias))
    shape = list(weight.shape)
    return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=module.eps)


def _factors(norm: RMSNorm, full: FullTensor) -> Tensor:
    return full(norm.weight) + norm.offset


def _queries(
    attention: Attention, config: ModelConfig, full: FullTensor, dtype: torch.dtype
) -> Queries:
    norms, eps = None, 0.0
    if attention.q_norm and attention.k_norm:
        q_factors, k_factors = (_factors(one, full) for one in (attention.q_norm, attention.k_norm))
        norms = torch.cat((q_factors * config.score_scale, k_factors)).to(dtype)
        eps = attention.q_norm.eps
    return Queries(
        config.n_head,
        config.kv_heads,
        config.head_width,
        norms=norms,
        eps=eps,
        is_wide=config.wide_qk_norm,
    )
