"""The chunked head: many chunks equal one, and none is large."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gptray.model import loss as module
from gptray.model.loss import linear_cross_entropy, rows_per_chunk, token_cross_entropy


@pytest.mark.parametrize("vocab_size", [1, 65, 2048, 50257, 50304, 128_000, 2**24, 2**27])
def test_logits_of_a_chunk_stay_far_below_256_mb(vocab_size: int) -> None:
    rows = rows_per_chunk(vocab_size)
    assert rows >= 1
    copies = 4 + 2 + 2  # fp32, and bf16 of the logits and of their gradient
    assert rows == 1 or rows * vocab_size * copies <= 128 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 13, 40])
def test_chunks_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "rows_per_chunk", lambda vocab_size: rows)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 16, generator=generator, requires_grad=True)
    x = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(29, (40,), generator=generator)
    loss = linear_cross_entropy(x, weight, targets, valid=29)
    logits = F.linear(x.float(), weight.to(dtype).float())[:, :29]
    expected = F.cross_entropy(logits, targets)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 3e-2}
    torch.testing.assert_close(loss, expected, **close)
    tokens = token_cross_entropy(x, weight, targets, valid=29)
    torch.testing.assert_close(tokens.mean(), expected, **close)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (x, weight)),
        torch.autograd.grad(3 * expected, (x, weight)),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **close)


def test_a_second_backward_pass_is_refused() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(3, 4), weight, torch.tensor([0, 1, 2]), valid=5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
