"""The project's own kernels for training in bf16, against fp32 and against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model import kernels
from gptray.model.gpt import GPT
from gptray.model.layers import activation
from gptray.model.loss import IGNORED
from gptray.model.rotary import Angles, rotate
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
        assert (mine.to(theirs.dtype) - theirs).norm() <= off * theirs.norm()


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
    bare = gradients(lambda x, w: kernels.linear(x, w, None), [x, weight], upstream)
    assert_close(bare[:2], gradients(F.linear, [x.float(), weight], upstream)[:2], off=4e-3)
    assert torch.equal(bare[2], ours[2])


def test_a_linear_layer_takes_rows_with_gaps_between_them() -> None:
    wide, weight, bias = randn(3, 5, 16).bfloat16(), randn(8, 8), randn(8)
    x, upstream = wide[:, :, 4:12], randn(3, 5, 8).transpose(0, 1).contiguous().transpose(0, 1)
    ours = gradients(kernels.linear, [x, weight, bias], upstream)
    whole = gradients(kernels.linear, [x.contiguous(), weight, bias], upstream.contiguous())
    assert all(torch.equal(mine, other) for mine, other in zip(ours, whole, strict=True))


@pytest.mark.parametrize(("rows", "valid", "entries"), [(1, 7, 7), (40, 29, 31), (130, 1500, 1600)])
def test_a_heads_loss_and_gradients_are_those_of_fp32(rows: int, valid: int, entries: int) -> None:
    x, weight = randn(rows, 34).bfloat16(), randn(entries, 34, seed=1).div(4).bfloat16().float()
    targets = torch.randint(valid, (rows,), generator=torch.Generator().manual_seed(2))
    losses, grad_x, grad = kernels.head_loss(x, weight, targets, valid=valid, needs_weight=True)
    assert grad is not None

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight)[:, :valid], targets, reduction="none")

    expected = gradients(exact, [x.float(), weight], torch.ones(rows))
    assert_close([losses, grad_x, grad], expected, off=8e-3)
    assert torch.equal(grad[valid:], torch.zeros(entries - valid, 34))
    frozen = kernels.head_loss(x, weight, targets, valid=valid, needs_weight=False)
    assert torch.equal(frozen[0], losses) and torch.equal(frozen[1], grad_x) and frozen[2] is None


def reference(
    qkv: Tensor,
    n_head: int,
    kv_heads: int,
    *norms: Tensor,
    angles: Angles | None = None,
    eps: float = 0.0,
) -> Tensor:
    heads = qkv.view(*qkv.shape[:2], n_head + 2 * kv_heads, -1)
    q, k, v = torch.split(heads, [n_head, kv_heads, kv_heads], dim=2)
    if norms:
        q, k = (
            F.rms_norm(part, part.shape[-1:], weight, eps)
            for part, weight in zip((q, k), norms, strict=True)
        )
    if angles:
        q, k = (rotate(part, angles) for part in (q, k))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("width", [2, 24, 64, 130])
@pytest.mark.parametrize("length", [1, 2, 65, 191, 193, 400])
def test_attention_is_that_of_fp32(length: int, width: int) -> None:
    qkv, upstream = 2 * randn(2, length, 3 * 3 * width), randn(2, length, 3 * width, seed=1)
    qkv, upstream = qkv.bfloat16(), upstream.bfloat16()
    ours = gradients(lambda x: kernels.attention(x, 3, 3), [qkv], upstream)
    exact = gradients(lambda x: reference(x, 3, 3), [qkv.float()], upstream.float())
    assert_close(ours, exact, off=0.01)


@pytest.mark.parametrize("rotated", [0, 6, 20])
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(("length", "heads", "shared"), [(1, 2, 1), (70, 6, 2), (200, 3, 3)])
def test_heads_that_are_normalised_rotated_and_shared_are_those_of_fp64(
    length: int, heads: int, shared: int, is_normed: bool, rotated: int
) -> None:
    width, eps = 20, 1e-3
    qkv = (2 * randn(2, length, (heads + 2 * shared) * width)).bfloat16()
    upstream = randn(2, length, heads * width, seed=1).bfloat16()
    norms = [1 + 0.3 * randn(width, seed=2), 1 + 0.3 * randn(width, seed=3)] if is_normed else []
    turns = randn(length, rotated // 2, seed=4)
    angles = (turns.cos().bfloat16(), turns.sin().bfloat16()) if rotated else None

    def native(qkv: Tensor, *norms: Tensor) -> Tensor:
        pair = (norms[0], norms[1]) if norms else None
        return kernels.attention(qkv, heads, shared, angles=angles, norms=pair, eps=eps)

    def exact(qkv: Tensor, *norms: Tensor) -> Tensor:
        turned = (angles[0].double(), angles[1].double()) if angles else None
        return reference(qkv, heads, shared, *norms, angles=turned, eps=eps)

    ours = gradients(native, [qkv, *norms], upstream)
    theirs = gradients(exact, [one.double() for one in (qkv, *norms)], upstream)
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * len(norms)
    if length == 1:  # one key: its gradient is rounding
        ours, theirs = ours[:1], theirs[:1]
    assert_close(ours, theirs, off=0.015)


def test_no_token_attends_to_a_later_one() -> None:
    qkv, changed = randn(1, 300, 3 * 32).bfloat16(), randn(1, 300, 3 * 32, seed=1).bfloat16()
    changed[:, :200] = qkv[:, :200]
    before, after = kernels.attention(qkv, 2, 2), kernels.attention(changed, 2, 2)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def native_mlp(x: Tensor, *weights: Tensor, kind: str) -> Tensor:
    if len(weights) == 2:
        return kernels.mlp(x, weights[0], None, weights[1], None, kind=kind)
    first, bias, out, out_bias = weights
    return kernels.mlp(x, first, bias, out, out_bias, kind=kind)


def plain_mlp(x: Tensor, *weights: Tensor, kind: str) -> Tensor:
    half = len(weights) // 2
    return F.linear(activation(F.linear(x, *weights[:half]), kind), *weights[half:])


@pytest.mark.parametrize("kind", ["gelu_new", "gelu", "relu", "swiglu", "geglu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 2, 6), (7, 66, 34), (130, 96, 288)])
def test_an_mlp_is_that_of_fp32(
    rows: int, width: int, inner: int, has_bias: bool, kind: str
) -> None:
    x, upstream = randn(rows, width).bfloat16(), randn(rows, width, seed=1).bfloat16()
    outputs = (2 if kind in ("swiglu", "geglu") else 1) * inner
    weights = [
        (2 * randn(outputs, width, seed=2) / width**0.5).bfloat16().float(),
        randn(outputs, seed=3),
        randn(width, inner, seed=4).bfloat16().float(),
        randn(width, seed=5),
    ]
    if not has_bias:
        weights = weights[::2]
    ours = gradients(partial(native_mlp, kind=kind), [x, *weights], upstream)
    exact = gradients(partial(plain_mlp, kind=kind), [x.float(), *weights], upstream.float())
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * len(weights)
    assert_close(ours, exact, off=0.02 if rows == 1 else 7e-3)


@pytest.mark.parametrize("kind", ["gelu_new", "gelu", "relu"])
def test_an_mlp_has_the_activation_of_fp32(kind: str) -> None:
    # Weights of 1 and 0 leave x alone: y is the activation of x.
    z = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e4, 0.0, 1e4])]).bfloat16()
    x = torch.stack([z, torch.zeros_like(z)], dim=1)
    upstream = randn(len(z), 2).bfloat16()
    weights = [torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2)]
    ours = gradients(partial(native_mlp, kind=kind), [x, *weights], upstream)
    exact = gradients(partial(plain_mlp, kind=kind), [x.float(), *weights], upstream.float())
    assert_close(ours[:2], exact[:2], off=4e-3)
    assert torch.isfinite(torch.cat([one.flatten() for one in ours])).all()


@pytest.mark.parametrize(("rows", "width"), [(1, 6), (3, 40), (1000, 130)])
def test_layer_norm_is_that_of_fp32(rows: int, width: int) -> None:
    x, upstream = (3 * randn(rows, width) + 1).bfloat16(), randn(rows, width, seed=1).bfloat16()
    weight, bias = randn(width, seed=2), randn(width, seed=3)
    inputs = [x, weight, bias]
    ours = gradients(lambda x, w, b: kernels.norm(x, w, b, 1e-5), inputs, upstream)
    exact = gradients(
        lambda x, *a: F.layer_norm(x, (width,), *a), [x.float(), weight, bias], upstream.float()
    )
    assert_close(ours[:2], exact[:2], off=5e-3)
    assert_close(ours[2:], exact[2:], off=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 6), (3, 40), (1000, 130)])
def test_rms_norm_is_that_of_fp32(rows: int, width: int) -> None:
    x, upstream = (3 * randn(rows, width) + 1).bfloat16(), randn(rows, width, seed=1).bfloat16()
    inputs = [x, randn(width, seed=2)]
    ours = gradients(lambda x, w: kernels.norm(x, w, None, 1e-5), inputs, upstream)
    exact = gradients(
        lambda x, w: F.rms_norm(x, (width,), w, 1e-5), [x.float(), inputs[1]], upstream.float()
    )
    assert_close(ours[:2], exact[:2], off=5e-3)
    assert_close(ours[2:], exact[2:], off=1e-4)


ROTARY = {"positions": "rotary", "n_kv_head": 1, "norm": "rmsnorm", "mlp": "swiglu"}
NO_BIAS: dict[str, object] = dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), False)
NETWORKS: list[dict[str, object]] = [
    {},
    ROTARY | NO_BIAS,
    ROTARY | {"qk_norm": True, "head_dim": 18, "post_norm": True, "mlp": "gelu"},
    {"positions": "rotary", "partial_rotary_factor": 0.5, "parallel_residual": True},
    {"sliding_window": 9, "norm": "none", "qk_norm": True, "attn_out_bias": False},
]


def small_gpt(fields: dict[str, object] | None = None) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": 70, **(fields or {})}
    model = GPT(ModelConfig.model_validate(shape), vocab_size=50)
    model.compute_dtype = torch.bfloat16
    return model


def loss_and_gradients(model: GPT, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """run: what computes in place of the model."""
    ids = torch.randint(50, (3, 71), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, 5:9] = IGNORED
    loss = (model if run is None else run)(ids[:, :-1], targets)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
def test_a_model_learns_the_same_by_kernels_and_without(fields: dict[str, object]) -> None:
    plain, native = small_gpt(fields), small_gpt(fields)
    native.use_kernels()
    assert native.is_native and not plain.is_native
    theirs, ours = loss_and_gradients(plain), loss_and_gradients(native)
    assert torch.allclose(ours[0], theirs[0], rtol=2e-3)
    assert_close(ours[1:], [one.float() for one in theirs[1:]], off=0.03)


@pytest.mark.parametrize("fields", NETWORKS[:4], ids=str)
def test_a_step_has_the_same_bits_at_any_number_of_threads(fields: dict[str, object]) -> None:
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        model = small_gpt(fields)
        model.use_kernels()
        found.append(loss_and_gradients(model))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.slow
def test_a_compiled_step_computes_by_kernels_too() -> None:
    model = small_gpt(ROTARY | {"n_layer": 1, "qk_norm": True})
    model.use_kernels()
    eager = [one.float() for one in loss_and_gradients(model)]
    model.zero_grad()
    assert_close(loss_and_gradients(model, torch.compile(model)), eager, off=0.02)


def test_a_width_that_no_word_holds_is_left_to_pytorch() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=3, n_embd=9, n_positions=8), vocab_size=5)
    model.compute_dtype = torch.bfloat16
    model.use_kernels()
    assert not model.is_native
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])))
