"""The head and its cross-entropy in row chunks, so that no more than one chunk of logits exists.

The gradient is made in the forward pass, while a chunk's logits are at hand; the backward pass
only scales it. Weights come as fp32 masters and their gradient is summed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of one chunk's logits in fp32: 64 MiB holds 320 rows of GPT-2's vocabulary.
CHUNK_BYTES = 64 * 2**20


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
        _chunk_losses(_logits(chunk, weight, valid), target)[0]
        for chunk, target in zip(torch.split(x, rows), torch.split(targets, rows), strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def _logits(x: Tensor, weight: Tensor, valid: int) -> Tensor:
    logits = torch.mm(x, weight.t()).float()  # (rows, V)
    if valid < weight.size(0):
        logits[:, valid:] = float("-inf")
    return logits


def _chunk_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and the log normaliser (rows, 1)."""
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    picked = logits.gather(1, targets.unsqueeze(1))
    return (normaliser - picked).squeeze(1), normaliser


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, valid: int) -> Tensor:
        tokens, cast = x.size(0), weight.to(x.dtype)
        rows = rows_per_chunk(weight.size(0))
        losses, grad_x = [], []
        grad_weight: Tensor | None = None
        for chunk, target in zip(torch.split(x, rows), torch.split(targets, rows), strict=True):
            logits = _logits(chunk, cast, valid)
            loss, normaliser = _chunk_losses(logits, target)
            losses.append(loss)
            # d mean / d logits = (softmax - onehot) / N
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, target.unsqueeze(1), -torch.ones_like(normaliser))
            grad = grad.mul_(1.0 / tokens).to(x.dtype)
            grad_x.append(torch.mm(grad, cast))
            part = torch.mm(grad.t(), chunk)
            grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
        assert grad_weight is not None, "no token to score"
        ctx.save_for_backward(grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x), grad_weight)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # In place: the gradient of a large head is too big to copy, and is used once.
        return grad_x.mul_(grads[0]), grad_weight.mul_(grads[0]), None, None
