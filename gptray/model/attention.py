"""Causal self-attention on packed q, k, v: the fastest exact way for device, dtype and length.

On a CPU in bf16, and with dropout, batched GEMMs over blocks of queries that never touch a key
beyond their block; elsewhere PyTorch's scaled_dot_product_attention. `gptray.model.kernels` has the
project's own for bf16 on a CPU, without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.autograd_context import AttentionContext
from gptray.model.layers import dropout_mask

QUERY_BLOCK = 128


def causal_attention(
    qkv: Tensor, n_head: int, *, dropout: float = 0.0, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v, with dropout on the probabilities.

    qkv (B, T, 3C) holds q, k and v side by side, each of n_head heads of D = C / n_head.
    Returns (B, T, C). Dropout draws from torch's global generator. window: how many tokens a token
    looks back over, itself included; None: all.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    back = window if window is not None and window < T else 0
    if qkv.device.type == "cpu" and (qkv.dtype == torch.bfloat16 or dropout):
        y: Tensor
        if torch.compiler.is_compiling():
            y = _blocked_op(qkv, n_head, dropout, back)[0]
        else:
            y = _BlockedAttention.apply(qkv, n_head, dropout, back)  # type: ignore[no-untyped-call]
        return y
    # In this order the gradients of q, k and v, (B, T, H, D) in memory, join by one copy.
    q, k, v = (part.transpose(1, 2) for part in qkv.view(B, T, 3, n_head, C // n_head).unbind(2))
    if back:
        seen = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril().triu(1 - back)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _heads(qkv: Tensor, n_head: int) -> Tensor:
    """(B, T, 3C) -> (3, B*H, T, D), a copy."""
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    heads = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    copy = heads.clone(memory_format=torch.contiguous_format)  # even of a single token
    return copy.view(3, B * n_head, T, C // n_head)


def _blocks(tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries, start and stop, and the first key that one of them sees; window 0: all."""
    for start in range(0, tokens, QUERY_BLOCK):
        first = max(0, start - window + 1) if window else 0
        yield start, min(start + QUERY_BLOCK, tokens), first


def _future(length: int, like: Tensor) -> Tensor:
    """-inf above the diagonal, 0 elsewhere, (length, length)."""
    return torch.full((length, length), float("-inf"), dtype=like.dtype).triu(1)


def _mask(scores: Tensor, start: int, first: int, window: int) -> None:
    """Hide keys after each query, and those before its window. scores (B*H, queries, keys)."""
    queries, keys = scores.shape[-2:]
    scores[:, :, start - first :].add_(_future(queries, scores))
    if window:
        hidden = torch.full((queries, keys), float("-inf"), dtype=scores.dtype)
        scores.add_(hidden.tril(start - first - window))


def _forward(qkv: Tensor, n_head: int, dropout: float, window: int) -> list[Tensor]:
    """The output (B, T, C), and for the backward pass the heads, then each block's probabilities
    and, with dropout, its mask."""
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    heads = _heads(qkv, n_head)
    q, k, v = heads.unbind(0)
    q.mul_(1.0 / math.sqrt(C // n_head))
    out = qkv.new_empty(B, T, n_head, C // n_head)
    kept: list[Tensor] = []
    for start, stop, first in _blocks(T, window):
        scores = torch.bmm(q[:, start:stop], k[:, first:stop].transpose(1, 2))
        _mask(scores, start, first, window)
        probabilities = torch.softmax(scores, dim=-1)
        kept.append(probabilities)
        if dropout:
            kept.append(dropout_mask(probabilities, dropout))
            probabilities = probabilities * kept[-1]
        part = torch.bmm(probabilities, v[:, first:stop])
        out[:, start:stop] = part.view(B, n_head, stop - start, -1).transpose(1, 2)
    return [out.view(B, T, C), heads, *kept]


def _backward(
    grad: Tensor, saved: list[Tensor], n_head: int, has_dropout: bool, window: int
) -> Tensor:
    """The gradient of qkv (B, T, 3C): four GEMMs a block, none of them to make scores again."""
    heads, *kept = saved
    q, k, v = heads.unbind(0)
    B, H, T, D = grad.size(0), n_head, q.size(1), q.size(2)
    grad = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
    grad_qkv = grad.new_empty(B, T, 3, H, D)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    blocks = iter(kept)
    for start, stop, first in _blocks(T, window):
        probabilities = dropped = next(blocks)
        part = grad[:, start:stop]
        grad_p = torch.bmm(part, v[:, first:stop].transpose(1, 2))
        if has_dropout:
            mask = next(blocks)
            dropped = probabilities * mask
            grad_p.mul_(mask)
        grad_v[:, first:stop] += torch.bmm(dropped.transpose(1, 2), part)
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
        grad_k[:, first:stop] += torch.bmm(grad_s.transpose(1, 2), q[:, start:stop])
        grad_q = torch.bmm(grad_s, k[:, first:stop]).mul_(1.0 / math.sqrt(D))
        grad_qkv[:, start:stop, 0] = grad_q.view(B, H, stop - start, D).transpose(1, 2)
    grad_qkv[:, :, 1] = grad_k.view(B, H, T, D).transpose(1, 2)
    grad_qkv[:, :, 2] = grad_v.view(B, H, T, D).transpose(1, 2)
    return grad_qkv.view(B, T, 3 * H * D)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AttentionContext, qkv: Tensor, n_head: int, dropout: float, window: int
    ) -> Tensor:
        out, *saved = _forward(qkv, n_head, dropout, window)
        ctx.n_head, ctx.has_dropout, ctx.window = n_head, bool(dropout), window
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: AttentionContext, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        saved, of = list(ctx.saved_tensors), (ctx.n_head, ctx.has_dropout, ctx.window)
        return _backward(grads[0].contiguous(), saved, *of), None, None, None


# The same two functions as operators that torch.compile calls and does not look into: the softmax
# that inductor would make of them is several times slower than PyTorch's.
@torch.library.custom_op("gptray::blocked_attention", mutates_args=())
def _blocked_op(qkv: Tensor, n_head: int, dropout: float, window: int) -> list[Tensor]:
    return _forward(qkv.contiguous(), n_head, dropout, window)


@_blocked_op.register_fake
def _(qkv: Tensor, n_head: int, dropout: float, window: int) -> list[Tensor]:
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    blocks = _blocks(T, window)
    shapes = [(B * n_head, stop - start, stop - first) for start, stop, first in blocks]
    kept = [qkv.new_empty(shape) for shape in shapes for _ in range(2 if dropout else 1)]
    return [qkv.new_empty(B, T, C), qkv.new_empty(3, B * n_head, T, C // n_head), *kept]


@torch.library.custom_op("gptray::blocked_attention_backward", mutates_args=())
def _blocked_backward_op(
    grad: Tensor, saved: list[Tensor], n_head: int, has_dropout: bool, window: int
) -> Tensor:
    return _backward(grad.contiguous(), saved, n_head, has_dropout, window)


@_blocked_backward_op.register_fake
def _(grad: Tensor, saved: list[Tensor], n_head: int, has_dropout: bool, window: int) -> Tensor:
    return grad.new_empty(grad.size(0), grad.size(1), 3 * grad.size(2))


def _keep(
    ctx: AttentionContext, inputs: tuple[Tensor, int, float, int], output: list[Tensor]
) -> None:
    ctx.n_head, ctx.has_dropout, ctx.window = inputs[1], bool(inputs[2]), inputs[3]
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: AttentionContext, grads: list[Tensor]) -> tuple[Tensor, None, None, None]:
    saved, of = list(ctx.saved_tensors), (ctx.n_head, ctx.has_dropout, ctx.window)
    return _blocked_backward_op(grads[0], saved, *of), None, None, None


_blocked_op.register_autograd(_differentiate, setup_context=_keep)
