"""Frozen layers with adapters by the project's own kernels, against the formula in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model import frozen_kernels, kernels
from gptray.model.frozen_layer import Adapters, FrozenLayer, dequantized
from gptray.model.layers import activation, drawn_mask
from gptray.model.quantized import quantize
from tests.generation.models import needs_native
from tests.model.test_kernels import assert_close, gradients, randn

pytestmark = needs_native


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def frozen(
    inputs: int, outputs: int, spans: tuple[slice, ...] = (), *, rank: int = 2, seed: int = 10
) -> FrozenLayer:
    """A layer whose numbers bf16 holds exactly, with an adapter for each span of its outputs."""
    weight = (randn(outputs, inputs, seed=seed) / inputs**0.5).bfloat16()
    layer = FrozenLayer(weight, None, randn(outputs, seed=seed + 1))
    if not spans:
        return layer
    a = randn(len(spans) * rank, inputs, seed=seed + 2) / inputs**0.5
    b = randn(sum(span.stop - span.start for span in spans), rank, seed=seed + 3)
    return replace(
        layer, adapters=Adapters(a.bfloat16().float(), b.bfloat16().float(), spans, 0.5, None)
    )


def masked(layer: FrozenLayer, rows: int) -> FrozenLayer:
    """The layer with dropout of what its adapters read."""
    assert layer.adapters
    torch.manual_seed(0)
    mask = drawn_mask((rows, layer.values.size(1)), 0.5, torch.bfloat16)
    return replace(layer, adapters=replace(layer.adapters, mask=mask))


def taught(layer: FrozenLayer, pair: list[Tensor]) -> FrozenLayer:
    """The layer with these A and B."""
    if not layer.adapters:
        return layer
    return replace(layer, adapters=replace(layer.adapters, a=pair[0], b=pair[1]))


def formula(x: Tensor, layer: FrozenLayer) -> Tensor:
    held = layer.values, layer.scales, layer.kind
    weight = dequantized(*held, x.size(-1), torch.float32).float()
    y = F.linear(x, weight, layer.bias)
    if not layer.adapters:
        return y
    adapters, start = layer.adapters, 0
    read = x if adapters.mask is None else x * adapters.mask.float()
    added, rank = torch.zeros_like(y), adapters.b.size(1)
    for number, span in enumerate(adapters.spans):
        stop = start + span.stop - span.start
        own = (
            read @ adapters.a[number * rank : (number + 1) * rank].t() @ adapters.b[start:stop].t()
        )
        added = added + F.pad(own, (span.start, y.size(-1) - span.stop))
        start = stop
    return y + adapters.scale * added


def both(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], x: Tensor, *learns: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, of the kernels and in fp32."""
    upstream = randn(*ours(x, *learns).shape, seed=5).bfloat16()
    return gradients(ours, [x, *learns], upstream), gradients(
        exact, [x.float(), *learns], upstream.float()
    )


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "spans"),
    [
        (1, 2, 2, 1, (slice(0, 2),)),
        (7, 34, 66, 3, (slice(0, 66),)),
        (100, 96, 288, 16, (slice(0, 96), slice(96, 192), slice(192, 288))),
        (129, 130, 70, 5, (slice(4, 20), slice(33, 70))),
        (300, 66, 20, 24, (slice(0, 20),)),
    ],
)
def test_a_frozen_layer_with_adapters_is_that_of_fp32(
    rows: int, inputs: int, outputs: int, rank: int, spans: tuple[slice, ...], has_dropout: bool
) -> None:
    layer, x = frozen(inputs, outputs, spans, rank=rank), randn(rows, inputs).bfloat16()
    if has_dropout:
        layer = masked(layer, rows)
    ours, exact = both(
        lambda x, *pair: frozen_kernels.linear(x, taught(layer, list(pair))),
        lambda x, *pair: formula(x, taught(layer, list(pair))),
        x,
        *layer.tensors,
    )
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_close(ours, exact, off=0.02 if rows == 1 else 8e-3)


@pytest.mark.parametrize("kind", ["gelu_new", "gelu", "relu", "swiglu", "geglu"])
@pytest.mark.parametrize("adapted", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_a_frozen_mlp_is_that_of_fp32(
    kind: str, adapted: tuple[int, ...], has_dropout: bool
) -> None:
    rows, width, inner = 70, 34, 66
    wide = 2 * inner if kind in ("swiglu", "geglu") else inner
    halves = (slice(0, inner), slice(inner, wide)) if wide > inner else (slice(0, inner),)
    spans = [halves if 0 in adapted else (), (slice(0, width),) if 1 in adapted else ()]
    layers = [frozen(width, wide, spans[0]), frozen(inner, width, spans[1], seed=20)]
    if has_dropout:
        layers = [masked(one, rows) if one.adapters else one for one in layers]

    def pair(learns: tuple[Tensor, ...]) -> list[FrozenLayer]:
        split = len(layers[0].tensors)
        return [taught(layers[0], list(learns[:split])), taught(layers[1], list(learns[split:]))]

    def native(x: Tensor, *learns: Tensor) -> Tensor:
        return frozen_kernels.mlp(x, *pair(learns), kind=kind)

    def exact(x: Tensor, *learns: Tensor) -> Tensor:
        first, second = pair(learns)
        return formula(activation(formula(x, first), kind), second)

    learns = layers[0].tensors + layers[1].tensors
    ours, expected = both(native, exact, randn(rows, width).bfloat16(), *learns)
    # ReLU's slope jumps, so a result that rounds across 0 has another.
    assert_close(ours, expected, off=0.04 if kind == "relu" else 0.015)


@pytest.mark.parametrize("kind", ["int8", "int4", "iq4_nl"])
def test_a_layer_in_few_bits_computes_as_when_it_is_whole(kind: str) -> None:
    layer, x = frozen(66, 40, (slice(0, 40),)), randn(9, 66).bfloat16()
    held = quantize(layer.values.float(), kind)
    few = replace(layer, values=held.values, scales=held.scales, kind=kind)
    whole = replace(layer, values=held.dequantize(torch.bfloat16))
    upstream = randn(9, 40, seed=1)
    results = [
        gradients(
            lambda x, *pair, one=one: frozen_kernels.linear(x, taught(one, list(pair))),
            [x, *layer.tensors],
            upstream,
        )
        for one in (few, whole)
    ]
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


def test_a_weight_of_one_input_is_made_whole_of_any_kind() -> None:
    weight = randn(6, 1)
    for kind in ("int8", "int4", "iq4_nl"):
        held = quantize(weight, kind)
        whole = dequantized(held.values, held.scales, kind, 1, torch.float32)
        assert torch.equal(whole, held.dequantize())


def test_a_frozen_layer_has_the_same_bits_at_any_number_of_threads() -> None:
    layer, x = masked(frozen(66, 98, (slice(0, 98),)), 230), randn(230, 66).bfloat16()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            gradients(
                lambda x, *pair: frozen_kernels.linear(x, taught(layer, list(pair))),
                [x, *layer.tensors],
                randn(230, 98, seed=1),
            )
        )
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_a_frozen_head_has_the_loss_and_gradient_of_its_fp32_weight() -> None:
    x, weight = randn(40, 34).bfloat16(), randn(31, 34, seed=1).bfloat16()
    targets = torch.randint(29, (40,), generator=torch.Generator().manual_seed(2))
    frozen_head, other = (
        kernels.head_loss(x, one, targets, valid=29, needs_weight=False)
        for one in (weight, weight.float())
    )
    assert torch.equal(frozen_head[0], other[0]) and torch.equal(frozen_head[1], other[1])


@pytest.mark.slow
def test_a_compiled_layer_and_mlp_compute_by_kernels_too() -> None:
    first, second = frozen(34, 66, (slice(0, 66),)), masked(frozen(66, 34, (slice(0, 34),)), 9)

    def block(x: Tensor, *learns: Tensor) -> Tensor:
        layers = taught(first, list(learns[:2])), taught(second, list(learns[2:]))
        y = frozen_kernels.mlp(x, *layers, kind="gelu")
        return frozen_kernels.linear(y + x, layers[0])

    inputs = [randn(9, 34).bfloat16(), *first.tensors, *second.tensors]
    results = [
        gradients(run, inputs, randn(9, 66, seed=1)) for run in (block, torch.compile(block))
    ]
    assert_close(results[1], results[0], off=0.02)
