"""Weights in int8 and int4: how close they are, what they hold, how many bytes they take."""

from __future__ import annotations

import math

import gguf
import pytest
import torch

from gptray.model.packed_weights import PACKINGS
from gptray.model.quantized import QuantizedWeight, quantize


def weights(outputs: int, inputs: int) -> torch.Tensor:
    """Rows of different sizes, one of them of zeros."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(outputs, inputs, generator=random)
    return rows * torch.logspace(-2, 2, outputs)[:, None] * (torch.arange(outputs) != 1)[:, None]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("int4", 0.12), ("iq4_nl", 0.1)])
@pytest.mark.parametrize("inputs", [1, 32, 33, 96, 130])
def test_a_quantized_weight_is_close_and_comes_back_to_the_bit(
    kind: str, most: float, inputs: int
) -> None:
    weight = weights(5, inputs)
    found = quantize(weight, kind).dequantize()
    assert bool(((found - weight).norm(dim=1) <= most * weight.norm(dim=1)).all())
    assert torch.equal(quantize(found, kind).dequantize(), found)


def test_int4_is_what_its_documentation_says() -> None:
    values, scale = torch.tensor([-8, 7, 0, 3, -1]), 0.25
    found = quantize(values[None] * scale, "int4")
    assert found.scales.tolist() == [[scale]] and found.scales.dtype == torch.float16
    assert found.integers().tolist() == [values.tolist()]
    assert found.values.tolist() == [[0 | 15 << 4, 8 | 11 << 4, 7 | 8 << 4]]


def test_iq4_nl_is_what_gguf_reads_and_nearer_to_weights_than_int4() -> None:
    weight = weights(5, 96)
    found = quantize(weight, "iq4_nl")
    codes = found.codes().view(5, 3, 2, 16)
    blocks = torch.cat(
        (found.scales[..., None].view(torch.uint8), codes[:, :, 0] | codes[:, :, 1] << 4), dim=-1
    )
    read = gguf.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType.IQ4_NL)
    assert torch.equal(torch.from_numpy(read), found.dequantize())
    error = (found.dequantize() - weight).norm(dim=1)
    assert bool((error <= 0.09 * weight.norm(dim=1)).all())
    assert float(error.sum()) < 0.95 * float(
        (quantize(weight, "int4").dequantize() - weight).norm(dim=1).sum()
    )


def test_a_row_of_iq4_nl_is_rounded_by_itself_whatever_its_length() -> None:
    for inputs in (1, 33, 70):
        weight = weights(9, inputs)
        whole = quantize(weight, "iq4_nl").dequantize()
        rows = [quantize(row[None], "iq4_nl").dequantize() for row in weight]
        assert torch.equal(whole, torch.cat(rows))


def counts(inputs: int) -> torch.Tensor:
    """Importances from 1 to 256."""
    return torch.randint(9, (inputs,), generator=torch.Generator().manual_seed(1)).float().exp2()


@pytest.mark.parametrize("kind", ["int4", "iq4_nl"])
def test_inputs_that_count_more_are_rounded_better(kind: str) -> None:
    weight, importance = weights(9, 320), counts(320)

    def error(found: QuantizedWeight) -> torch.Tensor:
        return (importance * (found.dequantize() - weight).square()).sum(1)

    counted = quantize(weight, kind, importance)
    plain = quantize(weight, kind)
    share = error(counted) / error(plain).clamp_min(1e-30)
    assert float(share.mean()) < 0.8 and float(share.max()) < 1
    # What came of it is rounded no more, whatever counts.
    for again in (None, importance, importance.flip(0)):
        found = quantize(counted.dequantize(), kind, again)
        assert torch.equal(found.dequantize(), counted.dequantize())


@pytest.mark.parametrize("end", [-8, -7, 7])
def test_no_group_of_int4_is_rounded_worse_than_by_its_greatest_weight(end: int) -> None:
    groups = weights(40, 96).view(-1, 32)
    greatest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scales = (greatest / end).half().float()
    simple = (groups / scales).nan_to_num().round().clamp(-8, 7) * scales
    found = quantize(groups, "int4").dequantize()
    errors = [(one - groups).double().square().sum(1) for one in (found, simple)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())


def test_a_group_has_a_scale_of_its_own() -> None:
    weight = torch.ones(1, 64)
    weight[0, 32:] = 1e-3
    error = (quantize(weight, "int4").dequantize() - weight).abs()
    assert float(error[0, 32:].max()) < 1e-6


def test_int4_takes_at_most_a_third_of_the_bytes_of_bf16_and_int8_about_half() -> None:
    def share(kind: str) -> float:
        return quantize(weights(64, 768), kind).nbytes / (64 * 768 * 2)

    assert share("int4") == share("iq4_nl") <= 0.32 and share("int8") <= 0.55


def test_rows_are_quantized_by_themselves() -> None:
    weight = weights(9, 70)
    whole = quantize(weight, "int4")
    parts = [quantize(row[None], "int4") for row in weight]
    values = torch.cat([part.values for part in parts])
    together = QuantizedWeight("int4", 70, values, torch.cat([part.scales for part in parts]))
    assert torch.equal(whole.dequantize(), together.dequantize())


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_stays_so_and_spoils_no_other_row(
    kind: str, bad: float
) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, kind).dequantize()
    weight[1, 3] = bad
    spoilt = quantize(weight, kind).dequantize()
    assert not spoilt[1].isfinite().all()
    assert torch.equal(spoilt[[0, 2]], whole[[0, 2]])
