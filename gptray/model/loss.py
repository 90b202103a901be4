"""The head and its cross-entropy in row chunks, so that no more than one chunk of logits exists.

The gradient is made in the forward pass, while a chunk's logits are at hand; the backward pass
only scales it. Weights come as fp32 masters and their gradient is summed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of one chunk's logits in fp32: 128 rows of GPT-2's vocabulary. Below 32 MiB, above which glibc
# takes every allocation fresh from the kernel, whose page faults cost more than the arithmetic.
CHUNK_BYTES = 28 * 2**20
# Rows of the head's gradient that are made and summed at a time, so that they stay in cache.
GRAD_ROWS = 4096


def rows_per_chunk(vocab_size: int) -> int:
    """Rows whose fp32 logits fit CHUNK_BYTES, a multiple of 32 where there are as many."""
    rows = CHUNK_BYTES // (4 * vocab_size)
    return rows // 32 * 32 if rows >= 32 else max(rows, 1)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, valid: int) -> Tensor:
    """Mean over N tokens of -log softmax(x @ weight.T)[target], a fp32 scalar.

    x (N, C) in the dtype to compute in, weight (V, C) fp32, targets (N,) int64. Only the first
    `valid` of the V rows are tokens: the others get no probability and no gradient.
    """
    if not torch.is_grad_enabled():
        return token_cross_entropy(x, weight, targets, valid=valid).mean()
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, valid)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, valid: int) -> Tensor:
    """-log softmax(x @ weight.T)[target] of each token, (N,) fp32; no gradient."""
    weight = weight.to(x.dtype)
    rows = rows_per_chunk(weight.size(0))
    losses = [
        -_log_probabilities(chunk, weight, valid).gather(1, target.unsqueeze(1)).squeeze(1)
        for chunk, target in zip(torch.split(x, rows), torch.split(targets, rows), strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def _log_probabilities(x: Tensor, weight: Tensor, valid: int) -> Tensor:
    logits = torch.mm(x, weight.t()).float()  # (rows, V)
    if valid < weight.size(0):
        logits[:, valid:] = float("-inf")
    return torch.log_softmax(logits, dim=-1)


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total (V, C) += grad^T (V, rows) @ x (rows, C), the sum in fp32."""
    rows = total.size(0) if torch.compiler.is_compiling() else GRAD_ROWS
    for start in range(0, total.size(0), rows):
        part = slice(start, start + rows)
        total[part] += torch.mm(grad[:, part].t(), x)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, valid: int) -> Tensor:
        cast = weight.to(x.dtype)
        rows = rows_per_chunk(weight.size(0))
        grad_weight = torch.zeros_like(weight)
        losses, grad_x = [], []
        for chunk, target in zip(torch.split(x, rows), torch.split(targets, rows), strict=True):
            log_p = _log_probabilities(chunk, cast, valid)
            picked = log_p.gather(1, target.unsqueeze(1))
            losses.append(picked)
            # d sum / d logits = softmax - onehot
            grad = log_p.exp_().scatter_(1, target.unsqueeze(1), picked.expm1()).to(x.dtype)
            grad_x.append(torch.mm(grad, cast))
            _add_product(grad_weight, grad, chunk)
        ctx.save_for_backward(grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x), grad_weight)
        return -torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0] / grad_x.size(0)
        # In place: the gradient of a large head is too big to copy, and is used once.
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None
