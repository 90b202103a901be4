"""Every family against transformers: the same logits here, and there again once saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gptray.config import ModelConfig, UserError
from gptray.model.families import KNOWN
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained, save_pretrained, to_file
from gptray.model.hf_config import family_of
from gptray.model.parameters import parameter_count, stored_parts
from gptray.model.rotary import frequencies
from gptray.model.shape import read_shape
from tests.model.foreign_models import FAMILIES, MIXES, SHAPES, make_hf

VOCAB_SIZE = 99
_YARN = {"type": "yarn", "factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope", "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 2.0, 2.5, 3.0], "long_factor": [2.0, 4.0, 9, 30.0],
}  # fmt: skip


def some_ids(count: int = 96) -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, count), generator=torch.Generator().manual_seed(0))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_transformers_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = make_hf(name, VOCAB_SIZE)
    theirs.save_pretrained(tmp_path / "theirs")
    model, idx = load_pretrained(tmp_path / "theirs").eval(), some_ids()
    expected = theirs(idx).logits
    torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=0)
    assert model.num_params == parameter_count(model.config, VOCAB_SIZE)
    unused = 2 * 48 if name.startswith("opt") else 0  # positions before the first
    assert model.num_params == sum(p.numel() for p in theirs.parameters()) - unused

    save_pretrained(model, tmp_path / "ours")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, trust_remote_code=False
    )
    again, info = loaded
    assert {key: len(problems) for key, problems in info.items() if problems} == {}
    assert type(again) is type(theirs)
    assert again.config.eos_token_id == theirs.config.eos_token_id
    torch.testing.assert_close(again(idx).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_transformers(name: str, tmp_path: Path) -> None:
    theirs, idx = make_hf(name, VOCAB_SIZE), some_ids()
    theirs.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path).eval()
    model(idx[:, :-1], idx[:, 1:]).backward()
    theirs(idx, labels=idx).loss.backward()
    weights = dict(model.named_parameters())
    for part in stored_parts(model.config, KNOWN[name], VOCAB_SIZE):
        grad = weights[part.parameter].grad
        assert grad is not None
        ours = to_file(grad[part.start : part.start + part.rows], part, model.config)
        expected = theirs.get_parameter(part.name).grad
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_bf16_is_close_to_fp32(name: str, tmp_path: Path) -> None:
    make_hf(name, VOCAB_SIZE, initializer_range=0.1).save_pretrained(tmp_path)
    model, idx = load_pretrained(tmp_path).eval(), some_ids()
    exact = model(idx)
    model.compute_dtype = torch.bfloat16
    assert (model(idx).float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_half_precision_are_read_into_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make_hf("qwen3", VOCAB_SIZE)
    theirs.to(dtype)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    queries, both = theirs.state_dict(), load_pretrained(tmp_path).state_dict()
    assert {weight.dtype for weight in both.values()} == {torch.float32}
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    packed = torch.cat([queries[one] for one in names])
    assert torch.equal(both["transformer.h.1.attn.c_attn.weight"], packed.float())


def test_files_of_older_releases_open(tmp_path: Path) -> None:
    make_hf("gpt_neox", VOCAB_SIZE, rotary_pct=0.5).save_pretrained(tmp_path)
    expected = load_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("gpt_neox."): one for name, one in load_file(path).items()}
    if "lm_head.weight" in tensors:
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    tensors["layers.0.attention.bias"] = torch.ones(1, 1, 96, 96)
    tensors["layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == expected.config
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama, linear", "llama, YaRN", "llama of release 3"])
def test_rope_scaling_is_read_from_the_older_keys(name: str, tmp_path: Path) -> None:
    make_hf(name, VOCAB_SIZE).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.rope_scaling
    old = dict(shape.rope_scaling)
    kind = old.pop("rope_type")
    edit(tmp_path, rope_parameters=None, rope_theta=shape.rope_theta)
    edit(tmp_path, rope_scaling={"type": kind, **old})
    assert read_shape(tmp_path) == shape


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**_YARN, "finetuned": True}},
        {
            "rope_scaling": {**_YARN, "original_max_position_embeddings": 48},
            "original_max_position_embeddings": 24,
        },
        {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0}},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
    ],
    ids=str,
)
@torch.no_grad()
def test_of_several_keys_for_rotary_positions_that_of_transformers_counts(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    make_hf("llama", VOCAB_SIZE).save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 70.0}, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    logits = load_pretrained(tmp_path).eval()(some_ids())
    torch.testing.assert_close(logits, theirs(some_ids()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@torch.no_grad()
def test_longrope_is_read_from_the_older_keys(kind: str, tmp_path: Path) -> None:
    make_hf("phi3, LongRoPE", VOCAB_SIZE).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    scaling = ("short_factor", "long_factor", "original_max_position_embeddings")
    old = {key: given[key] for key in scaling}
    edit(tmp_path, rope_parameters=None, rope_scaling={"type": kind, **old})
    edit(tmp_path, **{key: given[key] for key in ("rope_theta", "partial_rotary_factor")})
    assert read_shape(tmp_path) == shape
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    logits = load_pretrained(tmp_path).eval()(some_ids())
    torch.testing.assert_close(logits, theirs(some_ids()).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_gemmas_positions_are_read_from_the_older_keys(tmp_path: Path) -> None:
    make_hf("gemma3_text, six layers", VOCAB_SIZE).save_pretrained(tmp_path)
    bases = {"rope_theta": 700.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 3}
    edit(tmp_path, rope_parameters=None, layer_types=None, **bases)
    edit(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    model = load_pretrained(tmp_path).eval()
    windows = [model.config.window(layer) for layer in range(6)]
    assert windows == [7, 7, None] * 2 and model.config.rope_scaling
    torch.testing.assert_close(model(some_ids()), theirs(some_ids()).logits, atol=1e-4, rtol=0)


def test_with_longrope_the_original_context_is_read_and_the_whole_one_saved(tmp_path: Path) -> None:
    make_hf("phi3, LongRoPE", VOCAB_SIZE).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.n_positions == 96
    saved = ModelConfig.model_validate({**shape.model_dump(), "n_positions": 40})
    save_pretrained(GPT(saved, vocab_size=VOCAB_SIZE), tmp_path / "again")
    assert read_shape(tmp_path / "again") == shape
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == "phi3" and written["max_position_embeddings"] == 900
    with pytest.raises(ValueError, match="n_positions=97 is more than the 96 for which"):
        ModelConfig.model_validate({**shape.model_dump(), "n_positions": 97})


@pytest.mark.parametrize("model_type", KNOWN)
def test_what_a_config_leaves_out_is_as_in_transformers(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = read_shape(tmp_path)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    theirs = read_shape(tmp_path)
    same = {"n_kv_head": ours.kv_heads, "head_dim": ours.head_width}
    assert theirs.model_copy(update=same) == ours.model_copy(update=same)
    assert (theirs.kv_heads, theirs.head_width) == (ours.kv_heads, ours.head_width)


def test_yarn_takes_every_key_of_its_own() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    keys = {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}

    def made(**more: object) -> tuple[list[float], float]:
        config = ModelConfig.model_validate(
            {"positions": "rotary", "rope_scaling": {**yarn, **more}}
        )
        values, factor = frequencies(config)
        return values.tolist(), factor

    plain, factor = made()
    assert all(made(**{key: value})[0] != plain for key, value in keys.items())
    assert made(attention_factor=0.5) == (plain, 0.5)
    assert made(mscale=1.0, mscale_all_dim=1.0) == (plain, 1.0) and factor > 1.1
    assert made(mscale=0.7, mscale_all_dim=0) == (plain, factor)


@pytest.mark.parametrize("fields", MIXES, ids=str)
@torch.no_grad()
def test_a_mix_that_is_no_familys_is_gptrays_own(fields: dict[str, object], tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 20, **fields}
    config = ModelConfig.model_validate(shape)
    assert family_of(config) == "gptray"
    model = GPT(config, vocab_size=VOCAB_SIZE).eval()
    assert model.num_params == parameter_count(config, VOCAB_SIZE)
    save_pretrained(model, tmp_path)
    assert torch.equal(load_pretrained(tmp_path).eval()(some_ids(20)), model(some_ids(20)))
    with pytest.raises(ValueError, match="model type `gptray`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_network_from_scratch_is_saved_as_the_family_that_has_its_choices() -> None:
    llama: dict[str, Any] = {
        "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "qkv_bias": False,
        "attn_out_bias": False, "mlp_bias": False,
    }  # fmt: skip
    found = {
        "gpt2": {},
        "llama": llama,
        "mistral": llama | {"sliding_window": 8},
        "qwen2": llama | {"qkv_bias": True},
        "qwen3": llama | {"qk_norm": True},
        "gpt_neox": {"positions": "rotary", "parallel_residual": True},
        "exaone4": llama | {"qk_norm": True, "post_norm": True},
        "olmo2": llama | {"qk_norm": True, "wide_qk_norm": True, "post_norm": True},
        "olmo3": llama
        | dict.fromkeys(("qk_norm", "wide_qk_norm", "post_norm"), True)
        | {"sliding_window": 9, "rope_theta": 500000.0},
        "smollm3": llama | {"no_rope_layers": [1, 0]},
        "phi3": llama | {"partial_rotary_factor": 0.5},
        "gemma3_text": llama
        | {"mlp": "geglu", "qk_norm": True}
        | dict.fromkeys(("centred_norm", "sandwich_norm", "scale_embedding"), True),
        "gpt_neo": {"attention_scale": 1.0, "qkv_bias": False},
        "opt": {"mlp": "relu"},
        "gemma": llama
        | {"mlp": "geglu", **dict.fromkeys(("centred_norm", "scale_embedding"), True)},
        "stablelm": llama | {"norm": "layernorm"},
        "granite": llama | {"residual_multiplier": 0.22},
    }
    assert found.keys() == KNOWN.keys() - {"ernie4_5"}  # its networks are Llama's
    assert {name: family_of(ModelConfig(**fields)) for name, fields in found.items()} == {
        name: name for name in found
    }
    # transformers' Llama refuses a width that the heads do not divide, its Mistral does not.
    assert family_of(ModelConfig(**llama, n_embd=30, n_head=4, head_dim=8)) == "mistral"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "'mixtral' is not one of gpt2, llama, mistral, qwen2"),
        ("llama", {"model_type": "qwen3_5_text"}, "'qwen3_5_text' is not one of gpt2, llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers=3, but the weights have 2 layers"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: .* equal to 10000"),
        ("llama", {"num_attention_heads": 5}, "json: model.n_head=5 must be divisible"),
        ("llama", {"head_dim": None, "num_attention_heads": 10}, "model.n_embd=48 must be divis"),
        ("llama", {"num_key_value_heads": 4}, "n_head=6 must be divisible by model.n_kv_head=4"),
        ("llama", {"num_key_value_heads": 3}, r"q_proj|k_proj.weight has shape \[16, 48\]"),
        ("llama", {"head_dim": 7}, "rotates pairs"),
        ("llama", {"intermediate_size": 10**400}, "intermediate_size is above 2,147,483,647"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ("llama", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "only linear,"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "linear also needs factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "must be a number"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 1, "rope_type": "linear"}}, "than 1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            "beta_fast must be a number from",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "for each kind of layer"),
        ("llama", {"rope_parameters": ["x"]}, "is not a JSON object"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("exaone4", {"layer_types": ["x", "y"]}, "layer_types"),
        ("exaone4", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLLG"}, "needs layer_typ"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for model.n_layer=4"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "each layer must be 1 or 0"),
        ("smollm3", {"no_rope_layers": "all"}, "no_rope_layers"),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval=0 is not",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2}}, "only longrope"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "longrope also needs short_"),
        ("phi3", {"rope_parameters": _LONGROPE | {"short_factor": [1, 2]}}, "2 numbers for 4 p"),
        ("phi3", {"rope_parameters": _LONGROPE | {"long_factor": 3}}, "long_factor must be a list"),
        ("phi3", {"rope_parameters": _LONGROPE | {"long_factor": [0] * 4}}, "must be a number"),
        ("phi3", {"rope_parameters": _LONGROPE | {"long_factor": [10**400]}}, "rope_scaling"),
        ("gemma3_text", {"model_type": "gemma3"}, "'gemma3' is not one of gpt2, llama"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not"),
        ("gemma3_text", {"query_pre_attn_scalar": 168}, "=168 is not supported, only the 16 of"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "only 'gelu_pytorch_tanh'"),
        ("gemma3_text", {"rope_scaling": 3}, "are not JSON objects"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'linear' of sliding_attention is not supported, only 'default'",
        ),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, "only global and local"),
        ("gpt_neo", {"attention_types": [["global", "local"]]}, "only global and local"),
        ("gpt_neo", {"attention_types": 3}, "attention_types=3 is not supported, only global"),
        ("gpt_neo", {"attention_types": [[["local"], 3]]}, "layer_types has 3 entries for"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported, on"),
        ("opt", {"word_embed_proj_dim": 24}, "=24 is not supported, only the 48 of hidden_size"),
        ("opt", {"max_position_embeddings": 97}, r"\[98, 48\], but config.json says \[99, 48"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True is not supp"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True is not supported, only False"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_what_no_network_here_does_is_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_hf(name, VOCAB_SIZE).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as told:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
