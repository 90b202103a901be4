"""LoRA against PEFT: the same logits both ways, the same counts; and folders that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gptray.config import LoraConfig, UserError
from gptray.model.adapter import Base, trained_count
from gptray.model.adapter_files import (
    adapted_network,
    load_adapter,
    load_low_rank,
    load_merged,
    save_adapter,
)
from gptray.model.adapter_folder import Adapter, open_adapter
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained
from gptray.model.layers import Linear, dropout
from gptray.model.lora import LoRALinear
from gptray.model.parameters import Part
from tests.generation.models import needs_native
from tests.model.damaged_adapters import edit_config, edit_weights, only_pickle
from tests.model.foreign_models import FAMILIES, make_hf

# PEFT's.
pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB_SIZE = 41
NORMS_AND_EMBEDDINGS = ("norms", "embeddings")


def base_in(folder: Path, name: str) -> Base:
    make_hf(name, VOCAB_SIZE).save_pretrained(folder)
    return Base.of(str(folder))


def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Give all that learns other numbers, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def adapted(
    base: Base, lora: LoraConfig, dtype: torch.dtype = torch.float32, *, native: bool = False
) -> GPT:
    return adapted_network(
        base, lora, base.config, vocab_size=VOCAB_SIZE, dtype=dtype, native=native, seed=3
    ).eval()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Any = model.eval()(tokens())
    logits: Tensor = getattr(answer, "logits", answer)
    return logits


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in FAMILIES),
        ("gpt2", {"train": NORMS_AND_EMBEDDINGS, "use_rslora": False}),
        ("llama with biases", {"train": NORMS_AND_EMBEDDINGS}),
        ("gpt_neox", {"train": NORMS_AND_EMBEDDINGS}),
        ("llama", {"targets": ["q_proj", "v_proj", "up_proj"]}),
        ("gpt2", {"targets": ["attn.c_proj"]}),
    ],
)
def test_peft_computes_what_an_adapter_from_here_does(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", name)
    lora = LoraConfig.model_validate({"rank": 3, "alpha": 5.5, **settings})
    model = adapted(base, lora)
    torch.testing.assert_close(logits_of(model), logits_of(load_pretrained(base.folder)))
    disturb(model)
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", base, lora)
    merged = load_merged(base, open_adapter(tmp_path / "adapter", base))
    again = adapted(base, lora)
    load_adapter(again, tmp_path / "adapter", base)
    theirs = opened_by_peft(base.folder, tmp_path / "adapter")
    for other in (merged, theirs):
        torch.testing.assert_close(logits_of(other), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits_of(again), expected)
    learning = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert learning == trained_count(base, lora)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "qwen3", "ernie4_5"])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_an_adapter_of_pefts_computes_the_same_here(
    name: str, use_rslora: bool, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", name)
    theirs = peft_adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    ours = load_merged(base, open_adapter(tmp_path / "adapter", base))
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": r".*\.h\.\d+\.attn\.c_attn"}),
        ("llama", {"exclude_modules": ".*mlp.*"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["query_key_value"]}),
        ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {"rank_pattern": {"k_proj": 3, r"layers\.1\.self_attn\..*": 6}}),
        ("gpt2", {"rank_pattern": {"c_fc": 7}, "alpha_pattern": {"c_fc": 2, "h.1.attn.c_attn": 3}}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers_that_peft_chooses_in_its_own_ways_arrive(
    name: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", name)
    peft_adapter(base, tmp_path / "adapter", **settings)
    edit_weights(lambda x: x.update({k: v.to(dtype) for k, v in x.items()}))(tmp_path / "adapter")
    expected = logits_of(opened_by_peft(base.folder, tmp_path / "adapter"))
    ours = load_merged(base, open_adapter(tmp_path / "adapter", base))
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=1e-4)


def opened_by_peft(base: Path, adapter: Path) -> nn.Module:
    """PEFT's model of a base and an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    network: nn.Module = peft.PeftModel.from_pretrained(model, str(adapter))
    return network


def peft_adapter(base: Base, folder: Path, **settings: Any) -> nn.Module:
    config = {"r": 4, "lora_alpha": 9, "target_modules": "all-linear", **settings}
    theirs = AutoModelForCausalLM.from_pretrained(base.folder, trust_remote_code=False)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    disturb(model)
    model.save_pretrained(str(folder))
    network: nn.Module = model
    return network


def test_the_count_at_gpt2s_shape_is_pefts(tmp_path: Path) -> None:
    config = GPT2Config()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = peft.get_peft_model(
            GPT2LMHeadModel(config), peft.LoraConfig(r=16, target_modules="all-linear")
        )
    count, _ = theirs.get_nb_trainable_parameters()
    assert trained_count(Base.of(str(tmp_path)), LoraConfig(rank=16)) == count == 2_359_296


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_are_those_of_the_formula(p: float) -> None:
    torch.manual_seed(0)
    linear = Linear(5, 9)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    parts = [Part("", [], "", 0, 4), Part("", [], "", 6, 2)]
    layer = LoRALinear(linear.requires_grad_(False), parts, LoraConfig(rank=3, dropout=p))
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    given = torch.randn(2, 7, 5)
    learns = [given.requires_grad_(), layer.lora_A, layer.lora_B]

    def formula(x: Tensor) -> Tensor:
        read, y = dropout(x, p), nn.functional.linear(x, linear.weight, linear.bias)
        first = layer.scale * (read @ layer.lora_A[:3].t()) @ layer.lora_B[:4].t()
        second = layer.scale * (read @ layer.lora_A[3:].t()) @ layer.lora_B[4:].t()
        return torch.cat((y[..., :4] + first, y[..., 4:6], y[..., 6:8] + second, y[..., 8:]), -1)

    results = []
    for computes in (layer, formula):
        torch.manual_seed(1)
        y = computes(given)
        results.append([y, *torch.autograd.grad(y.square().sum(), learns)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_frozen_weights_are_kept_in_what_is_computed_in(tmp_path: Path) -> None:
    base = base_in(tmp_path, "gpt2")
    model = adapted(base, LoraConfig(rank=2), torch.bfloat16)
    kinds = {one.requires_grad: one.dtype for one in model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    model(tokens(), tokens()).backward()
    assert all((one.grad is not None) == one.requires_grad for one in model.parameters())


@needs_native
@pytest.mark.parametrize("quantized", ["none", "int4"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"targets": ["c_attn"], "train": NORMS_AND_EMBEDDINGS}),
        ("llama", {"targets": ["q_proj", "v_proj", "up_proj"], "train": ("norms",)}),
        ("llama with biases", {}),
        ("gpt_neox", {"targets": ["dense_4h_to_h"]}),
        ("qwen3", {}),
    ],
)
def test_an_adapter_learns_the_same_by_kernels_and_in_fp32(
    name: str, settings: dict[str, Any], quantized: str, tmp_path: Path
) -> None:
    make_hf(name, VOCAB_SIZE).save_pretrained(tmp_path)
    base = Base.of(str(tmp_path), quantized=quantized)
    lora = LoraConfig.model_validate({"rank": 3, **settings})
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(base, lora, dtype, native=dtype == torch.bfloat16)
        layers = [one for one in model.modules() if isinstance(one, LoRALinear)]
        assert {one.native for one in layers} == {dtype == torch.bfloat16}
        disturb(model)
        loss = model(tokens(), tokens())
        loss.backward()
        grads = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        assert len(grads) == sum(one.requires_grad for one in model.parameters())
        results.append((loss.detach(), torch.cat(grads)))
    (expected, grad), (loss, native_grad) = results
    assert abs(loss - expected) < 0.02 * expected
    assert torch.cosine_similarity(native_grad, grad, dim=0) > 0.98


@needs_native
@pytest.mark.parametrize("quantized", ["none", "int4"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc", "mlp.c_proj"]])
def test_layers_of_odd_widths_that_no_kernel_takes_learn_beside_the_others(
    targets: list[str], quantized: str, tmp_path: Path
) -> None:
    make_hf("gpt2", VOCAB_SIZE, n_inner=33).save_pretrained(tmp_path)
    base = Base.of(str(tmp_path), quantized=quantized)
    lora = LoraConfig.model_validate({"rank": 3, "targets": targets})
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(base, lora, dtype, native=dtype == torch.bfloat16)
        loss = model(tokens(), tokens())
        loss.backward()
        losses.append(loss.detach())
    assert model.is_native
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]


ATTN, WTE = "base_model.model.transformer.h.1.attn.c_attn", "base_model.model.transformer.wte"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (edit_config(use_dora=True), "adapter_config.json: use_dora=True is not supported"),
        (edit_config(peft_type="IA3"), "peft_type='IA3' is not supported, only LORA"),
        (
            edit_config(rank_pattern={"c_attn": 8}),
            r"lora_A.weight has shape \[4, 48\], but adapter_config.json .* ask for \[8, 48\]",
        ),
        (edit_config(rank_pattern={"c_attn": 0}), r"rank_pattern\['c_attn'\]=0 is not a rank"),
        (edit_config(alpha_pattern={"(": 8}), r"alpha_pattern: '\(': missing \)"),
        (edit_config(alpha_pattern=[8]), r"alpha_pattern=\[8\] is not a JSON object"),
        (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa' changed"),
        (edit_config(bias="all"), "bias='all' is not supported"),
        (
            edit_config(r=8),
            r"lora_A.weight has shape \[4, 48\], but adapter_config.json .* ask for \[8, 48\]",
        ),
        (edit_config(r="four"), "r='four' is not a rank"),
        (edit_config(target_modules=None), "target_modules=None is not a list of names"),
        (edit_config(target_modules="("), r"target_modules='\(': missing \)"),
        (edit_config(modules_to_save="wte"), "modules_to_save='wte' is not a list of names"),
        (
            edit_config(target_modules=["c_fc", "c_proj"]),
            "h.0.attn.c_attn has weights, but adapter_config.json does not name it",
        ),
        (only_pickle, "no adapter_model.safetensors but pickled weights"),
        (
            edit_weights(lambda x: x.pop(f"{ATTN}.lora_B.weight")),
            f"{ATTN}.lora_B.weight is missing",
        ),
        (
            edit_weights(lambda x: [x.pop(f"{ATTN}.lora_{one}.weight") for one in "AB"]),
            "no weights for transformer.h.1.attn.c_attn, which adapter_config.json names",
        ),
        (
            edit_weights(lambda x: x.update({k: v.to(torch.int8) for k, v in x.items()})),
            "is stored as I8",
        ),
        (
            edit_weights(lambda x: x.update({"base_model.model.other.weight": torch.ones(2)})),
            "base_model.model.other.weight is not a weight of an adapter",
        ),
        (
            edit_weights(lambda x: x.update({f"{WTE}.lora_embedding_A": torch.ones(4, 41)})),
            "transformer.wte is not a linear layer in the blocks of",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{"), "damaged"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_wrong_adapter_is_refused_in_one_line(
    damage: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    peft_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_fc", "c_proj"])
    open_adapter(tmp_path / "adapter", base)
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=told) as caught:
        open_adapter(tmp_path / "adapter", base)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_layer_that_a_pattern_names_and_that_has_no_weights_is_told(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    peft_adapter(base, tmp_path / "adapter", target_modules=".*c_attn")
    edit_weights(lambda x: [x.pop(f"{ATTN}.lora_{one}.weight") for one in "AB"])(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match=r"no weights for transformer\.h\.1\.attn\.c_attn, which"):
        open_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("load", [load_merged, load_low_rank])
def test_numbers_that_are_not_finite_are_refused(
    load: Callable[[Base, Adapter], object], tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    peft_adapter(base, tmp_path / "adapter")
    edit_weights(lambda x: x[f"{ATTN}.lora_A.weight"][0].fill_(math.nan))(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"{ATTN}\.lora_A\.weight has numbers that are not finite"):
        load(base, open_adapter(tmp_path / "adapter", base))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, lora = base_in(tmp_path / "base", "gpt2"), LoraConfig(rank=2)
    save_adapter(adapted(base, lora), tmp_path / "adapter", base, lora)
    theirs = make_hf("gpt2", VOCAB_SIZE)
    with torch.no_grad():
        theirs.get_parameter("transformer.ln_f.bias").add_(1)
    theirs.save_pretrained(tmp_path / "other")
    for other in (Base.of(str(tmp_path / "other")), base_in(tmp_path / "llama", "llama")):
        with pytest.raises(UserError, match=f"was trained on another model than {other.folder}"):
            open_adapter(tmp_path / "adapter", other)
    peft_adapter(base, tmp_path / "of peft")
    with pytest.raises(UserError, match=r"h.0.attn.c_attn is not a linear layer in the blocks of"):
        open_adapter(tmp_path / "of peft", Base.of(str(tmp_path / "llama")))


def test_a_head_that_left_its_embedding_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    lora = LoraConfig(rank=2, train=["embeddings"])
    save_adapter(adapted(base, lora), tmp_path / "adapter", base, lora)
    edit_weights(lambda x: x["base_model.model.lm_head.weight"].add_(1))(tmp_path / "adapter")
    with pytest.raises(UserError, match="its head is not the embedding, but the base ties them"):
        load_merged(base, open_adapter(tmp_path / "adapter", base))


def test_an_embedding_that_left_its_head_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    theirs = peft_adapter(base, tmp_path / "adapter", modules_to_save=["wte"])
    plain = AutoModelForCausalLM.from_pretrained(base.folder, trust_remote_code=False)
    assert torch.equal(
        theirs.get_parameter("base_model.model.lm_head.weight"), plain.lm_head.weight
    )
    with pytest.raises(UserError, match="has transformer.wte.weight but no lm_head.weight, so"):
        open_adapter(tmp_path / "adapter", base)


def test_an_unknown_target_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama")
    with pytest.raises(UserError, match=r"no linear layer q_prj .*did you mean q_proj\?"):
        trained_count(base, LoraConfig(rank=2, targets=["q_prj"]))
