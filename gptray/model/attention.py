"""Causal self-attention on packed q, k, v: the fastest exact way for device, dtype and length.

On CPU, batched GEMMs over blocks of queries that never touch a key beyond their block; on GPU,
PyTorch's fused kernels; inside torch.compile on CPU, one masked softmax that it fuses itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 128


def causal_attention(qkv: Tensor, n_head: int, *, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v, with dropout on the probabilities.

    qkv (B, T, 3C) holds q, k and v side by side, each of n_head heads of D = C / n_head.
    Returns (B, T, C). Dropout draws from torch's global generator.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    heads = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    if qkv.is_cuda or qkv.dtype == torch.float32:
        q, k, v = heads.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    elif torch.compiler.is_compiling():
        y = _masked(heads, dropout)
    else:
        y = _BlockedAttention.apply(heads.contiguous(), dropout)  # type: ignore[no-untyped-call]
    return y.transpose(1, 2).reshape(B, T, C)


def _masked(heads: Tensor, dropout: float) -> Tensor:
    q, k, v = heads.unbind(0)
    T = q.size(2)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.size(-1)))
    probabilities = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return probabilities @ v


class _BlockedAttention(torch.autograd.Function):
    """heads (3, B, H, T, D) -> (B, H, T, D); keeps the probabilities for the backward pass."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, dropout: float) -> Tensor:
        q, k, v = heads.flatten(1, 2).unbind(0)  # each (B*H, T, D)
        T, D = q.size(1), q.size(2)
        ctx.scale, ctx.dropout = 1.0 / math.sqrt(D), dropout
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        for start in range(0, T, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, T)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].transpose(1, 2)).mul_(ctx.scale)
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu_(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            kept.append(probabilities)
            if dropout:
                probabilities, mask = torch.native_dropout(probabilities, dropout, True)
                kept.append(mask)
            torch.bmm(probabilities, v[:, :stop], out=out[:, start:stop])
        ctx.save_for_backward(heads, *kept)
        return out.view(heads.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        heads, *kept = ctx.saved_tensors
        q, k, v = heads.flatten(1, 2).unbind(0)
        grad = grads[0].reshape(q.shape)
        grad_heads = torch.zeros_like(heads)
        grad_q, grad_k, grad_v = grad_heads.flatten(1, 2).unbind(0)
        blocks = iter(kept)
        for start in range(0, q.size(1), QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.size(1))
            probabilities = dropped = next(blocks)
            grad_p = torch.bmm(grad[:, start:stop], v[:, :stop].transpose(1, 2))
            if ctx.dropout:
                keep = next(blocks).to(grad_p.dtype).mul_(1.0 / (1.0 - ctx.dropout))
                dropped = probabilities * keep
                grad_p.mul_(keep)
            grad_v[:, :stop] += torch.bmm(dropped.transpose(1, 2), grad[:, start:stop])
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
            grad_s.mul_(ctx.scale)
            torch.bmm(grad_s, k[:, :stop], out=grad_q[:, start:stop])
            grad_k[:, :stop] += torch.bmm(grad_s.transpose(1, 2), q[:, start:stop])
        return grad_heads, None
