"""The loss against teachers: the formula of whole logits, in chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gptray.model import loss as module
from gptray.model.distillation import SoftTargets, distillation_loss
from gptray.model.loss import IGNORED, linear_cross_entropy

N, C, V, VALID = 23, 16, 31, 29


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_pieces_equal_the_formula_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, share: float
) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda *_, **__: rows)
    x, weight = some(N, C, seed=0).requires_grad_(), some(V, C, seed=1).requires_grad_()
    targets = torch.randint(VALID, (N,), generator=torch.Generator().manual_seed(2))
    targets[[0, 9]] = IGNORED
    counts = targets >= 0
    # The teachers have other widths, and one has rows that are no tokens.
    hidden, heads = (
        [some(N, 8, seed=3), some(N, 24, seed=4)],
        [
            some(VALID, 8, seed=5),
            some(V + 2, 24, seed=6),
        ],
    )
    soft = SoftTargets(hidden, heads, share)
    losses = distillation_loss(x, weight, targets, soft, valid=VALID)
    (3 * losses[0]).backward()  # type: ignore[no-untyped-call]
    ours = [losses.detach(), x.grad, weight.grad]

    x.grad = weight.grad = None
    each = [(h @ head.T)[:, :VALID].softmax(-1) for h, head in zip(hidden, heads, strict=True)]
    logits = (x @ weight.T)[counts, :VALID]
    of_text = F.cross_entropy(logits, targets[counts])
    of_teachers = F.cross_entropy(logits, torch.stack(each).mean(0)[counts])
    loss = (1 - share) * of_text + share * of_teachers
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    theirs = [torch.stack([loss, of_text]).detach(), x.grad, weight.grad]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    plain = linear_cross_entropy(x, weight, targets, valid=VALID)
    torch.testing.assert_close(losses[1], plain)


def test_a_frozen_head_gets_no_gradient() -> None:
    x, weight = some(N, C, seed=0).requires_grad_(), some(V, C, seed=1)
    targets = torch.zeros(N, dtype=torch.int64)
    soft = SoftTargets([some(N, 8, seed=3)], [some(V, 8, seed=5)], 0.5)
    distillation_loss(x, weight, targets, soft, valid=V)[0].backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
