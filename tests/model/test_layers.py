"""Attention, dropout and the linear layer against PyTorch's own."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model.attention import causal_attention
from gptray.model.layers import LayerNorm, Linear, RMSNorm, dropout, gelu


def reference(
    qkv: Tensor, n_head: int, mask: Tensor | float = 1.0, window: int | None = None
) -> Tensor:
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    scores = q @ k.transpose(-2, -1) / (C // n_head) ** 0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    if window is not None:
        future |= torch.ones(T, T, dtype=torch.bool).tril(-window)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(-1) * mask
    together: Tensor = (probabilities @ v).transpose(1, 2).reshape(B, T, C)
    return together


@pytest.mark.parametrize("window", [None, 1, 60, 200])
@pytest.mark.parametrize("length", [1, 100, 128, 130, 384])
def test_attention_in_bf16_equals_fp32(length: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, length, 3 * 32, generator=generator).bfloat16().requires_grad_()
    exact = qkv.detach().float().requires_grad_()
    ours = causal_attention(qkv, 4, window=window)
    theirs = reference(exact, 4, window=window)
    upstream = torch.randn(theirs.shape, generator=generator)
    (gradient,) = torch.autograd.grad(ours, qkv, upstream.bfloat16())
    (expected,) = torch.autograd.grad(theirs, exact, upstream)
    assert (ours.float() - theirs).norm() / theirs.norm() < 0.01
    assert (gradient.float() - expected).norm() / expected.norm() < 0.02


def test_attention_of_a_single_token_leaves_its_input_alone() -> None:
    given = torch.randn(1, 1, 3 * 8, dtype=torch.bfloat16)
    qkv = given.clone().requires_grad_()
    y = causal_attention(qkv * 1, 2)
    (gradient,) = torch.autograd.grad(y.sum(), qkv)
    assert torch.equal(y, given[:, :, 16:])
    assert torch.equal(gradient[:, :, 16:], torch.ones_like(y))
    with torch.no_grad():
        causal_attention(qkv, 2)
    assert torch.equal(qkv, given)


@pytest.mark.parametrize("window", [1, 60, 384])
def test_a_window_in_fp32_is_the_masked_formula(window: int) -> None:
    qkv = torch.randn(2, 384, 3 * 32, generator=torch.Generator().manual_seed(0))
    ours = causal_attention(qkv, 4, window=window)
    torch.testing.assert_close(ours, reference(qkv, 4, window=window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_torchs(dtype: torch.dtype, centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(norm="rmsnorm", layer_norm_epsilon=1e-3, centred_norm=centred)
    norm = RMSNorm(config, 48)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
    x = torch.randn(3, 70, 48, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    exact = x.detach().float().requires_grad_()
    expected = F.rms_norm(exact, (48,), norm.weight + (1.0 if centred else 0.0), 1e-3)
    ours = norm(x)
    assert ours.dtype == dtype
    grads = torch.autograd.grad(ours, [x, norm.weight], upstream)
    wanted = torch.autograd.grad(expected, [exact, norm.weight], upstream.float())
    off = 1e-6 if dtype == torch.float32 else 5e-3
    for mine, theirs in zip([ours, *grads], [expected, *wanted], strict=True):
        assert (mine.float() - theirs).norm() <= off * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_attention_has_the_right_mean_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 140, 3 * 16).to(dtype).requires_grad_()

    def run() -> Tensor:
        torch.manual_seed(3)
        return causal_attention(qkv, 2, dropout=0.4)

    mean = torch.stack([causal_attention(qkv, 2, dropout=0.4).detach() for _ in range(100)]).mean(0)
    exact = reference(qkv.detach().float(), 2)
    assert (mean.float() - exact)[:, 1:].norm() / exact.norm() < 0.15
    assert torch.equal(run(), run())
    # A token attends to itself alone at first: dropped, its output is 0, kept, v / 0.6.
    first = causal_attention(qkv, 2, dropout=0.4)[0, 0].float()
    v = qkv[0, 0, 32:].float()
    for head in (slice(0, 8), slice(8, 16)):
        kept = (first[head] - v[head] / 0.6).abs().max() < 0.02 * v[head].abs().max()
        assert kept or not first[head].any()


def test_dropped_attentions_gradient_is_that_of_its_mask() -> None:
    qkv = torch.randn(1, 5, 3 * 8, dtype=torch.float32).requires_grad_()

    def loss(values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return causal_attention(values, 2, dropout=0.4).square().sum()

    (gradient,) = torch.autograd.grad(loss(qkv), qkv)
    direction = torch.randn_like(qkv)
    with torch.no_grad():
        slope = (loss(qkv + 1e-2 * direction) - loss(qkv - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(3,), (1000, 1001)])
def test_dropout_keeps_the_mean_and_the_share(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = dropout(x, 0.1)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.9), atol=1e-4, rtol=0)
    if len(shape) > 1:
        assert abs((y == 0).float().mean().item() - 0.1) < 1e-3
        assert abs(y.mean().item() - 1) < 1e-3
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert dropout(x, 0.0) is x


def test_linear_in_bf16_gives_fp32_gradients_to_its_masters() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 40)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(2, 9, 24).bfloat16().requires_grad_()
    exact = [value.detach().float().requires_grad_() for value in (x, layer.weight, layer.bias)]
    ours, theirs = layer(x), F.linear(*exact)
    assert (ours.float() - theirs).norm() / theirs.norm() < 0.01
    upstream = torch.randn_like(theirs)
    gradients = torch.autograd.grad(ours, (x, layer.weight, layer.bias), upstream.bfloat16())
    assert [gradient.dtype for gradient in gradients] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    for gradient, expected in zip(
        gradients, torch.autograd.grad(theirs, exact, upstream), strict=True
    ):
        assert (gradient.float() - expected).norm() / expected.norm() < 0.01


def test_layer_norm_in_bf16_sums_its_gradients_over_many_rows() -> None:
    torch.manual_seed(0)
    layer = LayerNorm(24)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(4, 3000, 24).add(0.5).bfloat16().requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in (x, layer.weight, layer.bias)]
    ours, theirs = layer(x), F.layer_norm(exact[0], (24,), exact[1], exact[2])
    assert (ours.double() - theirs).norm() / theirs.norm() < 0.01
    upstream = torch.randn_like(x).add(0.1)
    gradients = torch.autograd.grad(ours, (x, layer.weight, layer.bias), upstream)
    assert [gradient.dtype for gradient in gradients[1:]] == [torch.float32] * 2
    for gradient, expected in zip(
        gradients, torch.autograd.grad(theirs, exact, upstream.double()), strict=True
    ):
        assert (gradient.double() - expected).norm() / expected.norm() < 0.01


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gelu_is_exact_to_fp32() -> None:
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    theirs, ours = F.gelu(x, approximate="tanh"), torch.compile(gelu)(x)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
    expected, gradient = (torch.autograd.grad(y.sum(), x)[0] for y in (theirs, ours))
    torch.testing.assert_close(gradient, expected, atol=5e-6, rtol=2e-6)
