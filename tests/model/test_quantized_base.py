"""Adapters beside a base whose weights are held in few bits (QLoRA)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptray.config import LoraConfig, UserError
from gptray.model.adapter import Base
from gptray.model.adapter_files import load_adapter, load_merged, save_adapter
from gptray.model.adapter_folder import open_adapter
from gptray.model.gpt import GPT, Block
from gptray.model.hf import load_pretrained, save_pretrained
from gptray.model.importance import input_importance
from gptray.model.quantized import quantize
from gptray.model.quantized_linear import quantized_layers
from gptray.model.weight_bytes import linear_bytes
from tests.model.foreign_models import FAMILIES
from tests.model.test_lora import (
    VOCAB_SIZE,
    adapted,
    base_in,
    disturb,
    logits_of,
    opened_by_peft,
    tokens,
)

# PEFT's.
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("int8", "int4", "iq4_nl")


@torch.no_grad()
def rounded_base(base: Base, kind: str, folder: Path) -> Base:
    """The base with the linear layers of its blocks rounded, in a folder of its own."""
    model = load_pretrained(base.folder)
    counts = input_importance(model, kind)
    for name, parameter in model.named_parameters():
        if name.startswith("transformer.h.") and parameter.dim() == 2:
            parameter.copy_(quantize(parameter, kind, counts.get(name)).dequantize())
    save_pretrained(model, folder)
    return Base.of(str(folder))


def gradients(model: GPT) -> dict[str, Tensor]:
    model(tokens(), tokens().roll(1, 1)).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_and_learns_as_beside_the_rounded_base(
    name: str, kind: str, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", name)
    lora = LoraConfig(rank=3, train=["norms"])
    model = adapted(replace(base, quantized=kind), lora)
    whole = adapted(rounded_base(base, kind, tmp_path / "rounded"), lora)
    for one in (model, whole):
        disturb(one)
    assert model.num_params == whole.num_params
    torch.testing.assert_close(logits_of(model), logits_of(whole))
    found, expected = gradients(model), gradients(whole)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", None), ("llama", ["q_proj", "up_proj"]), ("gpt_neox", None)]
)
def test_merged_it_is_what_was_trained(
    name: str, targets: list[str] | None, kind: str, tmp_path: Path
) -> None:
    plain = base_in(tmp_path / "base", name)
    base, lora = replace(plain, quantized=kind), LoraConfig(rank=3, targets=targets)
    model = adapted(base, lora)
    disturb(model)
    save_adapter(model, tmp_path / "adapter", base, lora)
    # The adapter says itself how its base was rounded.
    merged = load_merged(plain, open_adapter(tmp_path / "adapter", plain))
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=1e-4)
    ours, other = model.transformer.h[0], merged.transformer.h[0]
    assert isinstance(ours, Block) and isinstance(other, Block)
    whole = model.full_tensor(ours.attn.c_attn.weight)
    torch.testing.assert_close(whole, other.attn.c_attn.weight)
    again = adapted(base, lora)
    load_adapter(again, tmp_path / "adapter", base)
    assert torch.equal(logits_of(again), logits_of(model))
    theirs = logits_of(opened_by_peft(plain.folder, tmp_path / "adapter"))
    assert (theirs - logits_of(model)).norm() < 0.5 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_bytes_that_are_told(kind: str, tmp_path: Path) -> None:
    base = base_in(tmp_path, "llama")
    model = adapted(replace(base, quantized=kind), LoraConfig(rank=3, targets=["q_proj"]))
    layers = quantized_layers(model).values()
    held = sum(one.values.nbytes + one.scales.nbytes for one in layers)
    assert held == linear_bytes(base.config, kind)
    assert len(layers) == 4 * base.config.n_layer
    frozen = sum(one.nbytes for one in model.parameters() if not one.requires_grad)
    assert frozen < linear_bytes(base.config, "none")  # embedding, norms


def test_another_rounding_is_refused_when_it_resumes(tmp_path: Path) -> None:
    base = replace(base_in(tmp_path / "base", "gpt2"), quantized="int4")
    lora = LoraConfig(rank=3)
    save_adapter(adapted(base, lora), tmp_path / "adapter", base, lora)
    other = replace(base, quantized="int8")
    with pytest.raises(UserError, match=r"with quantize\.weights=int4, not int8"):
        load_adapter(adapted(other, lora), tmp_path / "adapter", other)


def test_no_weight_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    base = replace(base_in(tmp_path, "llama"), quantized="int4")
    model, kept = adapted(base, LoraConfig(rank=3, targets=["q_proj"])).train(), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens(), tokens().roll(1, 1))
    loss.backward()
    shapes = {tuple(one.weight.shape) for one in quantized_layers(model).values()}
    assert not [one for one in kept if one.is_floating_point() and tuple(one.shape) in shapes]
    assert VOCAB_SIZE not in {shape[0] for shape in shapes}
