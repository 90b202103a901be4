"""How much the inputs of layers count: what they are, and that nothing else changes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptray.config import ModelConfig
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained, save_pretrained
from gptray.model.importance import input_importance
from gptray.model.layers import Linear
from gptray.model.quantized import quantize
from gptray.model.rotary import Rotary
from gptray.model.unread import unread_network
from tests.model.foreign_models import FAMILIES
from tests.model.test_lora import base_in

WEIGHT = "transformer.h.0.attn.c_attn.weight"
NORM = "transformer.h.0.ln_1.weight"  # of what it reads


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def uneven(dropout: float = 0.0) -> GPT:
    """A network whose layers read inputs of very different sizes."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=40, dropout=dropout)
    model, random = GPT(config, vocab_size=50), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("ln_1.weight", "ln_2.weight")):
                parameter.copy_(torch.randn(64, generator=random).exp2().square())
    return model


def test_an_input_counts_by_its_mean_square() -> None:
    model = uneven()
    before = input_importance(model, "int4")
    with torch.no_grad():
        model.get_parameter(NORM)[3] *= 8
    after = input_importance(model, "int4")
    grown = after[WEIGHT] / before[WEIGHT]
    expected = torch.ones(64).index_fill(0, torch.tensor([3]), 64.0)
    assert torch.equal(grown, expected * grown[0])
    assert {len(one) for one in after.values()} == {64, 256} and len(after) == 8


def test_an_input_that_random_tokens_do_not_reach_counts_a_little() -> None:
    model = uneven()
    with torch.no_grad():
        model.get_parameter(NORM)[3] = 0
    found = input_importance(model, "iq4_nl")[WEIGHT]
    assert 0 < float(found[3]) == float(found.min()) < 2e-3 * float(found.mean())


def test_all_inputs_of_a_layer_that_reads_nothing_count_the_same() -> None:
    model = uneven()
    with torch.no_grad():
        model.get_parameter(NORM).zero_()
    assert torch.equal(input_importance(model, "int4")[WEIGHT], torch.ones(64))


def test_nothing_counts_where_a_row_has_one_scale() -> None:
    assert input_importance(uneven(), "int8") == input_importance(uneven(), "none") == {}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_of_what_the_network_itself_reads(name: str, tmp_path: Path) -> None:
    model, read = load_pretrained(base_in(tmp_path, name).folder).eval(), dict[str, Tensor]()
    counts = input_importance(model, "int4")
    for key, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(
                lambda _, given, key=key: read.update({f"{key}.weight": given[0][0]})
            )
    random, rows = torch.Generator().manual_seed(0), len(model.transformer.wte.weight)
    model(torch.randint(rows, (1, model.config.n_positions), generator=random))
    assert read.keys() == counts.keys()
    for key, rows_read in read.items():
        energy = rows_read.square().mean(0)
        shares = energy / energy.mean().log2().round().exp2()
        # Powers of two, and no share is below the least.
        off = (counts[key].log2() - shares.clamp(min=2.0**-10).log2()).abs().max()
        assert off < 0.51, key


@pytest.mark.parametrize("name", FAMILIES)
def test_it_depends_on_the_weights_alone(name: str, tmp_path: Path, threads: None) -> None:
    folder = base_in(tmp_path, name).folder
    expected = input_importance(load_pretrained(folder).eval(), "int4")
    torch.set_num_threads(1)
    for found in (
        input_importance(unread_network(folder), "int4"),
        input_importance(load_pretrained(folder).train(), "int4"),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(one, expected[key]) for key, one in found.items())


def test_angles_are_as_exact_as_what_is_computed_with_them() -> None:
    config = ModelConfig(n_head=2, n_embd=32, positions="rotary")
    angles, pairs = Rotary(config, torch.float64).at(torch.arange(300), torch.float64)[0], 8
    assert angles
    cos, sin = angles
    turns = [[place / 10000 ** (pair / pairs) for pair in range(pairs)] for place in range(300)]
    for found, exact in ((cos, math.cos), (sin, math.sin)):
        expected = torch.tensor([list(map(exact, row)) for row in turns], dtype=torch.float64)
        assert float((found - expected).abs().max()) < 1e-12


def test_dropout_is_left_out_and_goes_on_afterwards() -> None:
    model = uneven(dropout=0.5).train()
    found = input_importance(model, "int4")
    assert model.training
    assert all(
        torch.equal(one, found[key]) for key, one in input_importance(uneven(), "int4").items()
    )


@pytest.mark.parametrize("kind", ["int4", "iq4_nl"])
def test_logits_stay_nearer_than_when_all_inputs_count_the_same(kind: str) -> None:
    model, tokens = uneven(), torch.randint(50, (8, 40), generator=torch.Generator().manual_seed(1))
    counted = input_importance(model, kind)

    @torch.no_grad()
    def error(counts: dict[str, torch.Tensor]) -> float:
        rounded = uneven()
        for name, weight in rounded.named_parameters():
            if name in counted:
                weight.copy_(quantize(weight, kind, counts.get(name)).dequantize())
        return float((rounded(tokens) - model(tokens)).norm())

    assert error(counted) < 0.9 * error({})


def test_a_folder_saved_again_counts_the_same(tmp_path: Path) -> None:
    model = uneven()
    save_pretrained(model, tmp_path)
    found = input_importance(unread_network(tmp_path), "int4")
    assert all(torch.equal(one, found[key]) for key, one in input_importance(model, "int4").items())
