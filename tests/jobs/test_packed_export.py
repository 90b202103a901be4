"""Folders whose weights compressed-tensors packs: written, opened by its package and here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptray.config import UserError
from gptray.entry_points import run
from gptray.model.hf import load_pretrained
from gptray.model.importance import input_importance
from gptray.model.quantized import quantize
from gptray.model.unread import unread_network
from tests.generation.models import small_tokenizer
from tests.model.foreign_models import make_hf

# Rows of whole groups.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
NARROW_DOWN = WIDE | {"intermediate_size": 80}
NAMES = ("llama with biases", "qwen3", "gpt_neox")


def model_in(folder: Path, name: str, **changes: int) -> Path:
    tokenizer = small_tokenizer()
    make_hf(name, tokenizer.vocab_size, **changes).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def export(model: Path, output: Path, *words: str) -> int:
    return run("export", [f"export.model={model}", f"export.output_path={output}", *words])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_are_read_here_to_the_bit(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = WIDE | ({"head_dim": 16, "num_key_value_heads": 2} if "biases" in name else {})
    model, output = model_in(tmp_path / "model", name, **changes), tmp_path / "packed"
    assert export(model, output, "export.format=hf", f"export.precision={kind}") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    own, unread = load_pretrained(output), unread_network(output)
    counts = input_importance(unread_network(model), kind)
    lazy = dict(unread.named_parameters())
    for key, weight in load_pretrained(model).named_parameters():
        is_linear = key.startswith("transformer.h.") and weight.dim() == 2
        rounded = weight.half()
        if is_linear:
            rounded = quantize(weight.detach(), kind, counts.get(key)).dequantize()
        found = own.get_parameter(key)
        assert torch.equal(found, rounded.float()), key
        assert torch.equal(unread.full_tensor(lazy[key]), found), key
        # What an engine makes of it in the same kind is the same again.
        assert not is_linear or torch.equal(quantize(found.detach(), kind).dequantize(), found)
    stored = load_file(output / "model.safetensors")
    of_a_weight = 0.5 if kind == "int4" else 1.0
    for key in [one for one in stored if one.endswith("_packed")]:
        inputs = int(stored[key.replace("_packed", "_shape")][1])
        assert 4 * stored[key].size(1) == of_a_weight * inputs
    # It is exported again as any other.
    assert export(output, tmp_path / "again", "export.format=hf", "export.precision=fp32") == 0
    again = load_pretrained(tmp_path / "again")
    assert all(torch.equal(one, own.get_parameter(key)) for key, one in again.named_parameters())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("hf", "int8"), "2 of 14 matrices stay in fp16: model.layers.0.mlp.down_proj.weight, "),
        (("hf", "int4"), "2 of 14 matrices stay in fp16: model.layers.0.mlp.down_proj.weight, "),
        (("gguf", "q4_0"), "2 of 16 matrices stay in fp16: blk.0.ffn_down.weight, blk.1.ffn_down"),
    ],
)
def test_rows_that_are_not_whole_groups_stay_in_fp16(
    words: tuple[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_in(tmp_path / "model", "llama", **NARROW_DOWN)
    output = tmp_path / "packed.gguf"
    given = [f"export.format={words[0]}", f"export.precision={words[1]}"]
    for more in (["--dry-run"], []):
        assert export(model, output, *given, *more) == 0
        output_and_log = capsys.readouterr()
        assert told in output_and_log.out + output_and_log.err
    own = load_pretrained(output)
    for key, weight in load_pretrained(model).named_parameters():
        if key.endswith("mlp.c_proj.weight"):
            assert torch.equal(own.get_parameter(key), weight.detach().half().float())


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is missing"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", (*NAMES, "llama"))
def test_transformers_computes_the_same_with_packed_weights(
    name: str, kind: str, tmp_path: Path
) -> None:
    wide = NARROW_DOWN if name == "llama" else WIDE
    changes = wide | ({"head_dim": 16, "num_key_value_heads": 2} if "biases" in name else {})
    model, output = model_in(tmp_path / "model", name, **changes), tmp_path / "packed"
    assert export(model, output, "export.format=hf", f"export.precision={kind}") == 0
    theirs = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, trust_remote_code=False
    )
    theirs.train(False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load_pretrained(output).eval()(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("gpt2", ("hf", "int4"), "packs no layers of gpt2, which are Conv1D in transformers"),
        (
            "llama",
            ("hf", "int8"),
            "no matrix has rows of a multiple of 32 weights, which export.pr",
        ),
        (
            "llama",
            ("gguf", "q8_0"),
            "no matrix has rows of a multiple of 32 weights, which export.",
        ),
        ("llama", ("hf", "q4_0"), "is not available for export.format=hf, which takes fp32, fp16"),
        ("llama", ("gguf", "int4"), "is not available for export.format=gguf, which takes fp32"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    name: str,
    words: tuple[str, str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "packed.gguf"
    given = (f"export.format={words[0]}", f"export.precision={words[1]}")
    assert export(model_in(tmp_path / "model", name), output, *given) == 2
    assert told in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'; the only quantized weights supported"),
        ({"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        ({"config_groups": {}}, "it does not have exactly one group of layers"),
        (
            {"config_groups": {"one": {"input_activations": {}, "weights": {}}}},
            "not symmetric 4 or 8 bits",
        ),
    ],
)
def test_weights_that_are_quantized_in_another_way_are_refused(
    change: dict[str, object], told: str, tmp_path: Path
) -> None:
    model, output = model_in(tmp_path / "model", "llama", **WIDE), tmp_path / "packed"
    assert export(model, output, "export.format=hf", "export.precision=int4") == 0
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] |= change
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantization_config: .*") as error:
        load_pretrained(output)
    assert told in str(error.value)
