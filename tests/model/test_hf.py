"""Files: what gptray writes opens in transformers, what transformers writes opens here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gptray.config import ModelConfig, UserError
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained, load_weights, save_pretrained
from gptray.model.shape import read_shape

SHAPES: list[dict[str, Any]] = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 4},
    {"n_layer": 3, "n_head": 5, "n_embd": 35, "n_positions": 131, "n_inner": 17},
    {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 260, "layer_norm_epsilon": 1e-3},
]
VOCAB_SIZE = 67


@torch.no_grad()
def rough(module: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def make(fields: dict[str, Any] = SHAPES[1]) -> GPT:
    model = GPT(ModelConfig.model_validate(fields), vocab_size=VOCAB_SIZE)
    rough(model)
    return model


def make_hf(fields: dict[str, Any] = SHAPES[1]) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, **fields)
    model = GPT2LMHeadModel(config)
    model.train(False)
    rough(model)
    return model


def some_ids(positions: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, positions), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    save_pretrained(make(), tmp_path / "model", eos_token_id=0)
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Replace or (None) remove tensors; names with __ for the dots."""
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize("fields", SHAPES)
def test_transformers_opens_ours_with_no_missing_or_unexpected_key(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model = make(fields).eval()
    save_pretrained(model, tmp_path, eos_token_id=3)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, trust_remote_code=False
    )
    theirs, info = loaded
    assert {key: len(problems) for key, problems in info.items() if problems} == {}
    assert type(theirs) is GPT2LMHeadModel
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 3
    idx = some_ids(model.config.n_positions)
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_ours_opens_transformers_whole_and_in_shards(
    fields: dict[str, Any], shard_size: str, tmp_path: Path
) -> None:
    theirs = make_hf(fields)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    model = load_pretrained(tmp_path).eval()
    idx = some_ids(fields["n_positions"])
    torch.testing.assert_close(model(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_weights_are_the_same_bits_after_a_round_trip(tmp_path: Path) -> None:
    model = make()
    save_pretrained(model, tmp_path / "run" / "model")
    loaded = load_pretrained(tmp_path / "run")  # a run folder holds model/
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert loaded.config == model.config
    save_pretrained(loaded, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("run/model", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_files_are_fp32_readable_by_others_and_leave_nothing_else(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_dropout_is_the_files_or_the_callers(tmp_path: Path) -> None:
    save_pretrained(make(SHAPES[0] | {"dropout": 0.25}), tmp_path)
    assert load_pretrained(tmp_path).config.dropout == 0.25
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).config.attn_pdrop
        == 0.25
    )


def test_shape_is_read_from_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shape = read_shape(folder).model_dump()
    expected = {**SHAPES[1], "vocab_size": VOCAB_SIZE, "norm": "layernorm", "residual": True}
    assert {key: shape[key] for key in expected} == expected


def test_padding_is_left_out_of_files_and_zero_after_loading(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(SHAPES[0] | {"vocab_size": 80})
    model = GPT(config, vocab_size=VOCAB_SIZE)
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert theirs.config.vocab_size == theirs.lm_head.out_features == VOCAB_SIZE
    again = GPT(config, vocab_size=VOCAB_SIZE)
    rough(again)
    load_weights(again, tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({"norm": "none"}, "gptray-gpt2-nonorm"),
        ({"residual": False}, "gptray-gpt2-noresidual"),
        ({"norm": "none", "residual": False}, "gptray-gpt2-nonorm-noresidual"),
    ],
)
def test_ablations_load_here_and_nowhere_else(
    fields: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    model = make(SHAPES[1] | fields).eval()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    with pytest.raises(ValueError, match=model_type):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    loaded = load_pretrained(tmp_path).eval()
    idx = some_ids(20)
    assert torch.equal(loaded(idx), model(idx))


def test_old_files_open_without_prefix_with_buffers_and_a_copied_head(folder: Path) -> None:
    expected = load_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 131, 131)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, path)
    torch.testing.assert_close(load_pretrained(folder).state_dict(), expected.state_dict())


def test_half_precision_files_become_fp32(tmp_path: Path) -> None:
    make_hf().bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float32}


WTE = "transformer__wte__weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__h__1__ln_2__bias": None}, r"transformer.h.1.ln_2.bias is missing"),
        (
            {"transformer__h__1__ln_9__bias": torch.ones(35)},
            r"safetensors: .*ln_9.bias is not a weight",
        ),
        ({WTE: torch.ones(66, 35)}, r"safetensors: .*wte.weight has shape \[66, 35\].*\[67, 35\]"),
        (
            {"transformer__h__0__mlp__c_fc__weight": torch.ones(17, 35)},
            r"c_fc.weight has shape \[17, 35\], but config.json says \[35, 17\]",
        ),
        ({"lm_head__weight": torch.ones(67, 35)}, r"lm_head.weight is not the embedding"),
    ],
)
def test_wrong_weights_are_named(
    folder: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    edit_weights(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "config.json: model_type 'mixtral' is not one of gpt2, llama"),
        ({"model_type": None}, "config.json: model_type None"),
        ({"activation_function": "relu"}, "config.json: activation_function='relu'"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing from the weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 4}, "config.json: .*model.n_head=4"),
        ({"n_layer": "many"}, "config.json: n_layer"),
        ({"n_layer": 2}, "config.json: n_layer=2, but the weights have 3 layers"),
    ],
)
def test_wrong_configs_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_cut_weight_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors: damaged or incomplete"):
        load_pretrained(folder)


def edit_header(folder: Path, name: str, **changes: Any) -> None:
    """Change what a weight file says of a tensor, but none of its bytes."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**31 - 1, 35]}, r"has 9,380 bytes, not shape \[2147483647, 35\]"),
        ({"shape": [99999] * 50_000}, "wte.weight is outside the file"),
        ({"dtype": "F16"}, r"has 9,380 bytes, not shape \[67, 35\]"),
        ({"shape": [-1, 35]}, "wte.weight is outside the file"),
    ],
)
def test_a_header_that_lies_takes_no_memory(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, vocab_size=2**31 - 1)
    edit_header(folder, "transformer.wte.weight", **changes)
    with pytest.raises(UserError, match=f"model.safetensors: damaged or incomplete: .*{message}"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_pretrained(folder)


def test_a_folder_without_a_model_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder"):
        load_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no config.json"):
        load_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_pretrained(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="convert them once"):
        load_pretrained(folder)


def test_a_git_lfs_pointer_is_no_model(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="model.safetensors: .* `git lfs pull` fetches them"):
        load_pretrained(folder)


def test_shards_without_their_index_are_no_model(tmp_path: Path) -> None:
    make_hf().save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no model.safetensors.index.json"):
        load_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_hf().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_pretrained(tmp_path)
