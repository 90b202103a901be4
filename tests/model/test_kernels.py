"""The project's own kernels for training in bf16, against fp32 and against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model import kernels
from gptray.model.gpt import GPT
from tests.generation.models import needs_native

pytestmark = needs_native


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(run: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_close(ours: list[Tensor], exact: list[Tensor], *, off: float) -> None:
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.float() - theirs).norm() <= off * theirs.norm()


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 2, 2), (7, 34, 66), (129, 96, 288), (1100, 130, 20)]
)
def test_a_linear_layer_is_that_of_fp32(rows: int, inputs: int, outputs: int) -> None:
    x = randn(rows, inputs).bfloat16()
    # Weights that bf16 holds exactly: what is left is the rounding of results.
    weight = randn(outputs, inputs, seed=1).bfloat16().float()
    bias, upstream = randn(outputs, seed=2), randn(rows, outputs, seed=3).bfloat16().float()
    ours = gradients(kernels.linear, [x, weight, bias], upstream)
    exact = gradients(F.linear, [x.float(), weight, bias], upstream)
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_close(ours[:2], exact[:2], off=4e-3)
    assert_close(ours[2:], exact[2:], off=1e-5)  # sums of fp32, and not of bf16


def test_a_linear_layer_takes_rows_with_gaps_between_them() -> None:
    wide, weight, bias = randn(3, 5, 16).bfloat16(), randn(8, 8), randn(8)
    x, upstream = wide[:, :, 4:12], randn(3, 5, 8).transpose(0, 1).contiguous().transpose(0, 1)
    ours = gradients(kernels.linear, [x, weight, bias], upstream)
    whole = gradients(kernels.linear, [x.contiguous(), weight, bias], upstream.contiguous())
    assert all(torch.equal(mine, other) for mine, other in zip(ours, whole, strict=True))


def reference(qkv: Tensor, n_head: int) -> Tensor:
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


@pytest.mark.parametrize("width", [2, 24, 64])
@pytest.mark.parametrize("length", [1, 2, 65, 191, 193, 400])
def test_attention_is_that_of_fp32(length: int, width: int) -> None:
    qkv, upstream = 2 * randn(2, length, 3 * 3 * width), randn(2, length, 3 * width, seed=1)
    qkv, upstream = qkv.bfloat16(), upstream.bfloat16()
    ours = gradients(lambda x: kernels.attention(x, 3), [qkv], upstream)
    exact = gradients(lambda x: reference(x, 3), [qkv.float()], upstream.float())
    assert_close(ours, exact, off=0.01)


def test_no_token_attends_to_a_later_one() -> None:
    qkv, changed = randn(1, 300, 3 * 32).bfloat16(), randn(1, 300, 3 * 32, seed=1).bfloat16()
    changed[:, :200] = qkv[:, :200]
    before, after = kernels.attention(qkv, 2), kernels.attention(changed, 2)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def plain_mlp(x: Tensor, *weights: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, *weights[:2]), approximate="tanh"), *weights[2:])


@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 2, 6), (7, 66, 34), (130, 96, 288)])
def test_an_mlp_is_that_of_fp32(rows: int, width: int, inner: int) -> None:
    x, upstream = randn(rows, width).bfloat16(), randn(rows, width, seed=1).bfloat16()
    weights = [
        (2 * randn(inner, width, seed=2) / width**0.5).bfloat16().float(),
        randn(inner, seed=3),
        randn(width, inner, seed=4).bfloat16().float(),
        randn(width, seed=5),
    ]
    ours = gradients(kernels.mlp, [x, *weights], upstream)
    exact = gradients(plain_mlp, [x.float(), *weights], upstream.float())
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_close(ours, exact, off=5e-3)


def test_an_mlp_has_the_gelu_of_fp32() -> None:
    # Weights of 1 and 0 leave x alone: y is GELU of x.
    z = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e4, 0.0, 1e4])]).bfloat16()
    x = torch.stack([z, torch.zeros_like(z)], dim=1)
    upstream = randn(len(z), 2).bfloat16()
    weights = [torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2)]
    ours = gradients(kernels.mlp, [x, *weights], upstream)
    exact = gradients(plain_mlp, [x.float(), *weights], upstream.float())
    assert_close(ours[:2], exact[:2], off=4e-3)
    assert torch.isfinite(torch.cat([one.flatten() for one in ours])).all()


@pytest.mark.parametrize(("rows", "width"), [(1, 6), (3, 40), (1000, 130)])
def test_layer_norm_is_that_of_fp32(rows: int, width: int) -> None:
    x, upstream = (3 * randn(rows, width) + 1).bfloat16(), randn(rows, width, seed=1).bfloat16()
    weight, bias = randn(width, seed=2), randn(width, seed=3)
    inputs = [x, weight, bias]
    ours = gradients(lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5), inputs, upstream)
    exact = gradients(
        lambda x, *a: F.layer_norm(x, (width,), *a), [x.float(), weight, bias], upstream.float()
    )
    assert_close(ours[:2], exact[:2], off=5e-3)
    assert_close(ours[2:], exact[2:], off=1e-4)


def small_gpt() -> GPT:
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=48, n_positions=70)
    model = GPT(shape, vocab_size=50)
    model.compute_dtype = torch.bfloat16
    return model


def loss_and_gradients(model: GPT) -> list[Tensor]:
    ids = torch.randint(50, (3, 71), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_a_model_learns_the_same_by_kernels_and_without() -> None:
    plain, native = small_gpt(), small_gpt()
    native.use_kernels()
    assert native.is_native and not plain.is_native
    theirs, ours = loss_and_gradients(plain), loss_and_gradients(native)
    assert torch.allclose(ours[0], theirs[0], rtol=2e-3)
    assert_close(ours[1:], [one.float() for one in theirs[1:]], off=0.03)


def test_a_step_has_the_same_bits_at_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = small_gpt()
        model.use_kernels()
        found.append(loss_and_gradients(model))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_width_that_no_word_holds_is_left_to_pytorch() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=3, n_embd=9, n_positions=8), vocab_size=5)
    model.compute_dtype = torch.bfloat16
    model.use_kernels()
    assert not model.is_native
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])))
