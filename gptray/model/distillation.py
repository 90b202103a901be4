"""The distillation loss of the head: the targets are teachers' predictions and the text's tokens.

Hinton et al. 2015, Distilling the Knowledge in a Neural Network, at temperature 1. Several teachers
count as one ensemble: their probabilities are averaged. Computed in chunks of rows, as in
`gptray.model.loss`: only one chunk's logits exist at a time, the model's and one teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptray.model.autograd_context import Context
from gptray.model.loss import (
    add_product,
    chunks_of,
    log_probabilities,
    mean_loss,
    num_targets,
    zero_ignored,
)

# How many times as much memory as in `gptray.model.loss` a chunk needs, for the teachers' part.
COPIES = 2


@dataclass(frozen=True)
class SoftTargets:
    """The teachers' hidden states for the same N tokens; no gradients.

    hidden: each teacher's, (N, C), in the dtype of the computation. heads: each teacher's head,
    (V, C). share: the teachers' share of the loss, above 0 and at most 1.
    """

    hidden: Sequence[Tensor]
    heads: Sequence[Tensor]
    share: float


def distillation_loss(
    x: Tensor, weight: Tensor, targets: Tensor, soft: SoftTargets, *, valid: int
) -> Tensor:
    """The loss to minimise, and that of the text alone: (2,) fp32; only the first has a gradient.

    The first is the mean of the cross-entropy with the distribution
    (1 - share) * onehot(target) + share * mean over teachers of softmax(hidden @ head.T); the
    second is the cross-entropy with the target. Arguments as in `linear_cross_entropy`.
    """
    losses: Tensor = _DistillationLoss.apply(x, weight, targets, soft, valid)  # type: ignore[no-untyped-call]
    return losses


def _teachers_probabilities(soft: SoftTargets, rows: slice, valid: int) -> Tensor:
    """The average of the teachers' probabilities, (rows, valid) fp32."""
    total: Tensor | None = None
    for hidden, head in zip(soft.hidden, soft.heads, strict=True):
        p = log_probabilities(hidden[rows], head, valid)[:, :valid].exp_()
        total = p if total is None else total.add_(p)
    assert total is not None
    return total.div_(len(soft.hidden))


class _DistillationLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, as `linear_cross_entropy` does."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, targets: Tensor, soft: SoftTargets, valid: int
    ) -> Tensor:
        cast = weight.to(x.dtype)
        needs_weight = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        losses, grad_x, start = [], [], 0
        x, some = zero_ignored(x, targets), targets.clamp(min=0)  # any row will do if ignored
        for chunk, target in chunks_of(x, weight, some, copies=COPIES):
            rows = slice(start, start + len(chunk))
            start = rows.stop
            log_p = log_probabilities(chunk, cast, valid)
            q = _teachers_probabilities(soft, rows, valid)
            of_text = -log_p.gather(1, target).squeeze(1)
            of_teachers = -torch.linalg.vecdot(q, log_p[:, :valid])
            losses.append(torch.stack([torch.lerp(of_text, of_teachers, soft.share), of_text]))
            # d loss / d logits = softmax - target distribution
            grad = log_p.exp_()
            grad[:, :valid].sub_(q, alpha=soft.share)
            grad.scatter_(1, target, grad.gather(1, target) - (1 - soft.share))
            grad = grad.to(x.dtype)
            grad_x.append(torch.mm(grad, cast))
            if grad_weight is not None:
                add_product(grad_weight, grad, chunk)
        of_x = zero_ignored(torch.cat(grad_x), targets)
        ctx.save_for_backward(of_x, grad_weight, num_targets(targets))
        return mean_loss(torch.cat(losses, dim=1), targets)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grads[0][0] / count
        of_weight = grad_weight.mul_(scale) if ctx.needs_input_grad[1] else None
        return grad_x.mul_(scale), of_weight, None, None, None
