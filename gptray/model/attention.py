"""Causal self-attention: the module, and the fastest exact method for a device and dtype.

On a CPU, in bf16 or with dropout: batched GEMMs over blocks of queries that never touch a key
beyond their block. Elsewhere: PyTorch's scaled_dot_product_attention. `gptray.model.kernels` has
the native attention for bf16 on a CPU without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model import kernels
from gptray.model.layers import Linear, RMSNorm, dropout, dropout_mask
from gptray.model.operator import Given, Operator
from gptray.model.rotary import Angles, rotate

QUERY_BLOCK = 128


class Attention(nn.Module):
    """Causal self-attention; with kv_heads below n_head, query heads share keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.head_width = head_width = config.head_width
        self.dropout, self.native = config.dropout, False
        self.window = config.window(layer)
        # Attention itself divides scores by the square root of a head's width.
        own_scale = config.attention_scale is not None
        self.query_scale = config.score_scale * math.sqrt(head_width) if own_scale else 1.0
        qkv_width = (config.n_head + 2 * config.kv_heads) * head_width
        self.c_attn = Linear(config.n_embd, qkv_width, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        self.is_wide = config.wide_qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config, one) for one in config.qk_norm_widths)
        self.c_proj = Linear(config.n_head * head_width, config.n_embd, bias=config.attn_out_bias)

    def forward(self, x: Tensor, angles: Angles | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x)  # (B, T, (n_head + 2 kv_heads) head_width)
        if self.is_wide:
            qkv = self._normed(qkv)
        if self.query_scale != 1:
            queries = self.n_head * self.head_width
            q, kv = qkv[..., :queries], qkv[..., queries:]
            qkv = torch.cat((q * self.query_scale, kv), dim=-1)
        is_full = self.window is None or self.window >= x.size(1)
        if self.native and is_full and not p:
            y = self._native(qkv, angles)
        else:
            qkv = self._prepared(qkv, angles)
            y = causal_attention(qkv, self.n_head, dropout=p, window=self.window)
        return dropout(self.c_proj(y), p)

    def _normed(self, qkv: Tensor) -> Tensor:
        """q, k, v with one norm over all query heads, and one over all key heads."""
        assert self.q_norm and self.k_norm
        keys = self.kv_heads * self.head_width
        q, k, v = torch.split(qkv, [qkv.size(-1) - 2 * keys, keys, keys], dim=-1)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)

    def _native(self, qkv: Tensor, angles: Angles | None) -> Tensor:
        norms, eps = None, 0.0
        if self.q_norm and self.k_norm and not self.is_wide:
            norms, eps = (self.q_norm.scale, self.k_norm.scale), self.q_norm.eps
        heads = self.n_head, self.kv_heads
        return kernels.attention(qkv, *heads, angles=angles, norms=norms, eps=eps)

    def _prepared(self, qkv: Tensor, angles: Angles | None) -> Tensor:
        """Normalised and rotated q, k, v with n_head heads each, (B, T, 3 n_head head_width)."""
        is_grouped = self.kv_heads != self.n_head
        has_norms = self.q_norm is not None and not self.is_wide
        if not (is_grouped or angles or has_norms):
            return qkv
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_width)
        q, k, v = torch.split(heads, [self.n_head, self.kv_heads, self.kv_heads], dim=-2)
        if self.q_norm and self.k_norm and has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles:
            q, k = rotate(q, angles), rotate(k, angles)
        if is_grouped:
            k, v = (part.repeat_interleave(self.n_head // self.kv_heads, dim=-2) for part in (k, v))
        return torch.cat((q, k, v), dim=-2).flatten(-2)


def causal_attention(
    qkv: Tensor, n_head: int, *, dropout: float = 0.0, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v, with dropout on the probabilities.

    qkv (B, T, 3C) holds q, k and v side by side, each of n_head heads of D = C / n_head.
    Returns (B, T, C). Dropout draws from torch's global generator. window: tokens that a token
    attends to, including itself; None: all.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    back = window if window is not None and window < T else 0
    if qkv.device.type == "cpu" and (qkv.dtype == torch.bfloat16 or dropout):
        return _BLOCKED([qkv], numbers=[n_head, dropout, back])
    # In this layout one copy joins the gradients of q, k and v, (B, T, H, D) in memory.
    q, k, v = (part.transpose(1, 2) for part in qkv.view(B, T, 3, n_head, C // n_head).unbind(2))
    if back:
        seen = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril().triu(1 - back)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _heads(qkv: Tensor, n_head: int) -> Tensor:
    """Copy (B, T, 3C) to (3, B*H, T, D)."""
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    heads = qkv.reshape(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    copy = heads.clone(memory_format=torch.contiguous_format)  # even for a single token
    return copy.view(3, B * n_head, T, C // n_head)


def _blocks(tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield each block of queries: start, stop, and the first key that it sees; window 0: all."""
    for start in range(0, tokens, QUERY_BLOCK):
        first = max(0, start - window + 1) if window else 0
        yield start, min(start + QUERY_BLOCK, tokens), first


def _mask(scores: Tensor, start: int, first: int, window: int) -> None:
    """Mask keys after each query, and those before its window. scores (B*H, queries, keys)."""
    before = start - first  # keys before the block's own
    hidden = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype)
    scores[:, :, before:].add_(hidden[:, before:].triu(1))
    if window:
        scores.add_(hidden.tril(before - window))


def _forward(given: Given) -> list[Tensor]:
    """The output (B, T, C), and for the backward pass the heads, then each block's probabilities
    and, with dropout, its mask."""
    (qkv,), (n_head, dropout, window) = given.tensors, _settings(given.numbers)
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


def _backward(grad: Tensor, given: Given, saved: list[Tensor]) -> list[Tensor]:
    """The gradient of qkv (B, T, 3C): four GEMMs per block, none to recompute the scores."""
    (heads, *kept), (H, dropout, window) = saved, _settings(given.numbers)
    q, k, v = heads.unbind(0)
    B, T, D = grad.size(0), q.size(1), q.size(2)
    grad = grad.reshape(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
    grad_qkv = grad.new_empty(B, T, 3, H, D)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    blocks = iter(kept)
    for start, stop, first in _blocks(T, window):
        probabilities = dropped = next(blocks)
        part = grad[:, start:stop]
        grad_p = torch.bmm(part, v[:, first:stop].transpose(1, 2))
        if dropout:
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
    return [grad_qkv.view(B, T, 3 * H * D)]


def _shapes(given: Given) -> list[Tensor]:
    (qkv,), (n_head, dropout, window) = given.tensors, _settings(given.numbers)
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    blocks = _blocks(T, window)
    shapes = [(B * n_head, stop - start, stop - first) for start, stop, first in blocks]
    kept = [qkv.new_empty(shape) for shape in shapes for _ in range(2 if dropout else 1)]
    return [qkv.new_empty(B, T, C), qkv.new_empty(3, B * n_head, T, C // n_head), *kept]


def _settings(numbers: list[float]) -> tuple[int, float, int]:
    """The number of heads, dropout, and the window or 0."""
    n_head, dropout, window = numbers
    return int(n_head), dropout, int(window)


# Opaque to torch.compile, because inductor's softmax is several times slower than PyTorch's.
_BLOCKED = Operator("blocked_attention", _forward, _backward, _shapes, keeps_inputs=False)
