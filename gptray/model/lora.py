"""LoRA: a network with frozen linear layers and narrow trainable matrices alongside them.

Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models. Frozen weights are kept
quantized or in the dtype of the computation, adapters as fp32 masters. `gptray.model.adapter_files`
handles files.
Shapes: N tokens, P adapters of a layer, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import LoraConfig
from gptray.model import frozen_kernels
from gptray.model.autograd_context import AdaptedContext
from gptray.model.frozen_layer import Adapters, FrozenLayer, dequantized
from gptray.model.gpt import GPT, MLP
from gptray.model.layers import LayerNorm, Linear, RMSNorm, drawn_mask, dropout
from gptray.model.parameters import Part
from gptray.model.quantized_linear import QuantizedLinear


class LoRALinear(nn.Module):
    """A frozen linear layer, `base`, that also adds scale * B A x to its outputs.

    Each of the layers that are fused in it has an adapter for its own outputs. lora_A (P R, inputs)
    stacks their A, because all have the same input; lora_B (adapted outputs, R) stacks their B.
    """

    def __init__(
        self, base: Linear | QuantizedLinear, parts: Sequence[Part], lora: LoraConfig
    ) -> None:
        super().__init__()
        assert lora.rank
        self.base, self.native = base, base.native
        self.in_features, self.out_features = base.in_features, base.out_features
        self.spans = tuple(slice(part.start, part.start + part.rows) for part in parts)
        self.rank, self.scale, self.dropout = lora.rank, lora.scale, lora.dropout
        outputs = sum(part.rows for part in parts)
        self.lora_A = nn.Parameter(torch.empty(len(parts) * lora.rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank))

    @property
    def weight(self) -> Tensor:
        """The base's weight; `GPT.full_tensor` gives it dequantized and merged."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias
        return bias

    def pairs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each adapter's outputs, A (R, inputs) and B (outputs, R)."""
        each_a, each_b = torch.split(self.lora_A, self.rank), _split(self.lora_B, self.spans)
        yield from zip(self.spans, each_a, each_b, strict=True)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the adapters merged, in fp32."""
        weight = frozen_weight(self.base)
        for span, a, b in self.pairs():
            weight[span].addmm_(b, a, alpha=self.scale)
        return weight

    def frozen_layer(self, rows: torch.Size) -> FrozenLayer:
        """The data of base and adapters for the kernels of frozen layers, for x (*rows, inputs)."""
        mask = None
        if self.training and self.dropout:
            mask = drawn_mask((*rows, self.in_features), self.dropout, torch.bfloat16)
        adapters = Adapters(self.lora_A, self.lora_B, self.spans, self.scale, mask)
        return replace(self.base.frozen_layer(rows), adapters=adapters)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return frozen_kernels.linear(x, self.frozen_layer(x.shape[:-1]))
        read = dropout(x, self.dropout if self.training else 0.0)
        base = self.base.frozen_layer(x.shape[:-1])
        stored = base.values, base.scales, base.kind, base.bias
        adapters = self.lora_A, self.lora_B, self.spans, self.scale
        y: Tensor = _Adapted.apply(x, read, *stored, *adapters)  # type: ignore[no-untyped-call]
        return y


class FrozenMLP(nn.Module):
    """An MLP with frozen layers, with or without adapters, by `gptray.model.frozen_kernels`."""

    native = True

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.dropout, self.kind = mlp.dropout, mlp.kind
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x: Tensor) -> Tensor:
        first, second = (one.frozen_layer(x.shape[:-1]) for one in (self.c_fc, self.c_proj))
        y = frozen_kernels.mlp(x, first, second, kind=self.kind)
        return dropout(y, self.dropout if self.training else 0.0)


class _Adapted(torch.autograd.Function):
    """x W^T + b, and scale * (read A^T) B^T added to each adapter's outputs in place.

    read: x, or x after dropout. W and b get no gradient.
    """

    @staticmethod
    def forward(
        ctx: AdaptedContext,
        x: Tensor,
        read: Tensor,
        values: Tensor,
        scales: Tensor | None,
        kind: str,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        spans: tuple[slice, ...],
        scale: float,
    ) -> Tensor:
        ctx.kind, ctx.spans, ctx.scale, ctx.reads_all = kind, spans, scale, read is x
        y = F.linear(x, dequantized(values, scales, kind, x.size(-1), x.dtype), bias)
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        narrow = F.linear(read.flatten(0, -2), a)  # (N, P R)
        rows, rank = y.view(-1, y.size(-1)), b.size(1)
        for span, u, b_own in zip(
            spans, torch.split(narrow, rank, 1), _split(b, spans), strict=True
        ):
            rows[:, span].addmm_(u, b_own.t(), alpha=scale)
        ctx.save_for_backward(read, narrow, values, scales, lora_a, lora_b)
        return y

    @staticmethod
    def backward(ctx: AdaptedContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read, narrow, values, scales, lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)  # (N, outputs)
        a, b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
        grad_narrow = torch.empty_like(narrow)
        grad_b = torch.empty_like(lora_b)
        rank = b.size(1)
        parts = (torch.split(narrow, rank, 1), torch.split(grad_narrow, rank, 1))
        halves = (_split(b, ctx.spans), _split(grad_b, ctx.spans))
        for span, u, grad_u, b_own, to in zip(ctx.spans, *parts, *halves, strict=True):
            own = grad[:, span]
            grad_u.copy_(torch.mm(own, b_own).mul_(ctx.scale))
            to.copy_(torch.mm(own.t(), u).mul_(ctx.scale))
        grad_a = torch.mm(grad_narrow.t(), read.flatten(0, -2)).to(lora_a.dtype)
        rest = (None, None, None, None, grad_a, grad_b, None, None)
        if not ctx.needs_input_grad[0]:
            return None, None, *rest
        weight = dequantized(values, scales, ctx.kind, read.size(-1), grad.dtype)
        grad_x = torch.mm(grad, weight)
        if ctx.reads_all:
            return grad_x.addmm_(grad_narrow, a).view(read.shape), None, *rest
        return grad_x.view(read.shape), torch.mm(grad_narrow, a).view(read.shape), *rest


def frozen_weight(base: Linear | QuantizedLinear) -> Tensor:
    """A copy of a frozen layer's weight in fp32."""
    if isinstance(base, Linear):
        return base.weight.detach().float().clone()
    return dequantized(base.values, base.scales, base.kind, base.in_features, torch.float32)


def _split(b: Tensor, spans: Sequence[slice]) -> tuple[Tensor, ...]:
    return torch.split(b, [span.stop - span.start for span in spans])


def freeze(model: GPT, replaced: Sequence[Part], kind: str = "none") -> None:
    """Freeze a network on the meta device, except `replaced`, and cast it to the dtype in which it
    computes; a `kind` of `gptray.model.quantized` makes its blocks' linear layers quantized.

    What the kernels read in fp32 stays fp32: the norms of a network that uses kernels, because
    attention reads them, and the biases of native layers.
    """
    learns = {part.parameter for part in replaced}
    is_native = model.is_native
    for name, module in list(model.named_modules()):
        is_norm = isinstance(module, (LayerNorm, RMSNorm))
        keeps_bias = getattr(module, "native", False)
        for own, parameter in module.named_parameters(recurse=False):
            if f"{name}.{own}" not in learns:
                parameter.requires_grad_(False)
                if not (is_native and is_norm or keeps_bias and own == "bias"):
                    parameter.data = parameter.data.to(model.compute_dtype)
        if isinstance(module, Linear) and kind != "none":
            model.set_submodule(name, QuantizedLinear(module, kind))
    for name, module in list(model.named_modules()):
        if isinstance(module, MLP) and module.native:
            model.set_submodule(name, FrozenMLP(module))


@torch.no_grad()
def add_adapters(model: GPT, lora: LoraConfig, adapted: Sequence[Part], *, seed: int) -> None:
    """Add adapters for the parts `adapted` to a frozen network on the CPU.

    At first they change nothing: B is zero, and A is drawn as in PEFT, uniformly with a bound of
    1 / sqrt(inputs); a seed gives the same A on every device. `model.full_tensor` then merges.
    """
    by_layer = dict[str, list[Part]]()
    for part in adapted:
        by_layer.setdefault(part.parameter.removesuffix(".weight"), []).append(part)
    generator = torch.Generator().manual_seed(seed)
    for name, parts in by_layer.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear | QuantizedLinear)
        layer = LoRALinear(linear, parts, lora)
        bound = 1 / math.sqrt(linear.in_features)
        layer.lora_A.uniform_(-bound, bound, generator=generator)
        model.set_submodule(name, layer)
    # By weight; an adapted layer replaces its base.
    held = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    layers: dict[int, QuantizedLinear | LoRALinear] = {id(layer.weight): layer for layer in held}
    layers |= {id(m.weight): m for m in model.modules() if isinstance(m, LoRALinear)}

    def full_tensor(weight: Tensor) -> Tensor:
        layer = layers.get(id(weight))
        if layer is None:
            return weight.detach()
        return layer.merged() if isinstance(layer, LoRALinear) else frozen_weight(layer)

    model.full_tensor = full_tensor
