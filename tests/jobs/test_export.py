"""Exported models, read back by the libraries of their formats; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptray.data.tokenizer import Tokenizer, char_tokenizer
from gptray.entry_points import run
from gptray.model.hf import load_pretrained, save_pretrained
from gptray.model.importance import input_importance
from gptray.model.quantized import quantize
from tests.data import foreign
from tests.full_disk import files_up_to
from tests.generation.models import random_gpt, small_tokenizer
from tests.model.foreign_models import FAMILIES, make_hf

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Where GGUF has what, for a layer.
IN_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
OUTSIDE = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}


def saved(folder: Path, tokenizer: Tokenizer, **shape: Any) -> Path:
    model = random_gpt(tokenizer, **shape)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path / "book", small_tokenizer(), n_inner=50)


def export(model: Path, output: Path, *words: str) -> int:
    return run("export", [f"export.model={model}", f"export.output_path={output}", *words])


def hf_name(name: str) -> str:
    """What Hugging Face calls a tensor of GGUF's."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTSIDE:
        return f"transformer.{OUTSIDE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"transformer.h.{layer}.{IN_BLOCK[part]}.{kind}"


def expected(
    name: str, weight: Tensor, precision: str, counts: dict[str, Tensor]
) -> tuple[str, Tensor]:
    """GGUF's type of a weight as stored, and its numbers in fp32, in GGUF's layout."""
    if weight.ndim == 1 or name == "position_embd.weight":
        return "F32", weight
    turned = weight if name == "token_embd.weight" else weight.t()
    if precision in ("q8_0", "q4_0", "iq4_nl") and turned.size(1) % 32 == 0:
        if precision == "q8_0" or name == "token_embd.weight":
            return "Q8_0", turned
        kind = "int4" if precision == "q4_0" else precision
        return precision.upper(), quantize(turned, kind, counts[hf_name(name)]).dequantize()
    dtype = DTYPES.get(precision, torch.float16)
    return {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(precision, "F16"), turned.to(
        dtype
    ).float()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "q8_0", "q4_0", "iq4_nl"])
def test_a_gguf_file_has_every_weight_and_number(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    output = tmp_path / "new" / "book.gguf"
    assert export(model, output, f"export.precision={precision}") == 0
    told = capsys.readouterr()
    last = json.loads(told.out.splitlines()[-1])
    assert told.err.endswith(f"next:\n  llama-server -m {output}\n")
    size = output.stat().st_size
    assert last == {
        "path": str(output),
        "format": "gguf",
        "precision": precision,
        "bytes": size,
        "model": str(model),
    }
    reader = gguf.GGUFReader(output)
    weights = load_file(model / "model.safetensors")
    kind = "int4" if precision == "q4_0" else precision
    counts = input_importance(load_pretrained(model), kind)
    assert {hf_name(tensor.name) for tensor in reader.tensors} == set(weights)
    for tensor in reader.tensors:
        kind, weight = expected(tensor.name, weights[hf_name(tensor.name)], precision, counts)
        assert tensor.tensor_type.name == kind, tensor.name
        found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if kind == "Q8_0":  # the nearest of 255 steps of each 32 weights, the step itself in fp16
            steps = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert ((found - weight).reshape(-1, 32).abs() <= 0.57 * steps).all(), tensor.name
        else:
            assert torch.equal(found, weight), tensor.name
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["general.name"] == "book"
    numbers = {key[5:]: value for key, value in fields.items() if key.startswith("gpt2.")}
    assert numbers.pop("attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert numbers == {
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 50,
        "block_count": 2,
        "attention.head_count": 2,
    }


def vocabulary(path: Path) -> dict[str, Any]:
    start = "tokenizer.ggml."
    fields = gguf.GGUFReader(path).fields.items()
    return {key.removeprefix(start): one.contents() for key, one in fields if start in key}


def test_a_gguf_file_has_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = saved(tmp_path / "m", tokenizer)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert export(model, tmp_path / "m.gguf") == 0
    found = vocabulary(tmp_path / "m.gguf")
    assert found["model"] == "gpt2" and found["pre"] == "gpt-2"
    assert found["tokens"] == tokenizer.names
    merges = tokenizer.parts()["model"]["merges"]
    assert found["merges"] == [" ".join(pair) for pair in merges]
    assert found["token_type"] == [3, *[1] * (tokenizer.vocab_size - 1)]  # control, then normal
    assert found["eos_token_id"] == found["bos_token_id"] == tokenizer.eos_id == 0
    assert found["add_bos_token"] is False and found["add_eos_token"] is False
    template = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents()
    assert template == "{{ messages }}"


def test_characters_are_pieces_that_never_join(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("ab \n\uac00")
    assert export(saved(tmp_path / "m", tokenizer), tmp_path / "m.gguf") == 0
    found = vocabulary(tmp_path / "m.gguf")
    assert found["model"] == "llama" and found["add_space_prefix"] is False
    assert found["tokens"] == ["\n", "\u2581", "a", "b", "\uac00", "<|endoftext|>"]
    assert found["token_type"] == [1, 1, 1, 1, 1, 3]


def test_pieces_join_in_the_order_of_their_merges(tmp_path: Path) -> None:
    tokenizer = foreign.as_tokenizer(foreign.llama())
    assert export(saved(tmp_path / "m", tokenizer), tmp_path / "m.gguf") == 0
    found = vocabulary(tmp_path / "m.gguf")
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    merged = ["".join(pair) for pair in tokenizer.parts()["model"]["merges"]]
    assert found["model"] == "llama" and found["add_space_prefix"] is True
    assert sorted(set(merged), key=lambda name: -scores[name]) == list(dict.fromkeys(merged))
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (types["<0x41>"], types["<unk>"], types["</s>"]) == (6, 2, 3)


@pytest.mark.parametrize("precision", DTYPES)
def test_transformers_opens_a_folder_and_computes_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    output = tmp_path / "out"
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert export(model, output, "export.format=hf", f"export.precision={precision}") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    files = list(output.iterdir())
    assert last["bytes"] == sum(file.stat().st_size for file in files)
    assert {file.name for file in model.iterdir()} == {file.name for file in files}
    dtype = DTYPES[precision]
    found: Any = AutoModelForCausalLM.from_pretrained(
        output, trust_remote_code=False, output_loading_info=True, dtype="auto"
    )
    loaded, info = found
    assert not any(info.values()), info
    assert loaded.dtype == dtype
    original: Any = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=False, dtype=dtype
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(output, trust_remote_code=False)
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert tokenizer.chat_template == "{{ messages }}"


def test_old_files_of_transformers_lose_what_is_no_weight(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old["h.0.attn.bias"] = torch.ones(64, 64).tril()
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, path)
    assert export(model, tmp_path / "a.gguf", "export.precision=fp32") == 0
    assert export(model, tmp_path / "a", "export.precision=fp32", "export.format=hf") == 0
    tensors = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert {hf_name(tensor.name) for tensor in tensors} == set(weights)
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    old["lm_head.weight"][3, 3] += 1
    save_file(old, path)
    assert export(model, tmp_path / "b.gguf") == 2
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("shape", "said"),
    [({"norm": "none"}, "gpt2-nonorm"), ({"residual": False}, "gpt2-noresidual")],
)
@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_a_network_of_our_own_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shape: dict[str, object],
    said: str,
    form: str,
) -> None:
    model = saved(tmp_path / "m", small_tokenizer(), **shape)
    assert export(model, tmp_path / "a.gguf", f"export.format={form}") == 2
    err = capsys.readouterr().err
    assert err == (
        f"export: export.model={model}: its model_type gptray-{said} is gptray's own, which no "
        "other program can run\n"
    )
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exported_as_a_folder_that_transformers_opens(
    tmp_path: Path, name: str
) -> None:
    tokenizer = small_tokenizer()
    make_hf(name, tokenizer.vocab_size, eos_id=tokenizer.eos_id).save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    words = ("export.format=hf", "export.precision=bf16")
    assert export(tmp_path / "m", tmp_path / "half", *words) == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", output_loading_info=True, dtype="auto", trust_remote_code=False
    )
    theirs, info = loaded
    assert {key: len(problems) for key, problems in info.items() if problems} == {}
    before = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16, trust_remote_code=False
    )
    rounded = dict(before.named_parameters())
    assert all(torch.equal(one, rounded[key]) for key, one in theirs.named_parameters())


def strict_merges() -> tokenizers.Tokenizer:
    """Llama's with a merge less: two neighbours that are a token together stay apart."""
    backend = foreign.llama()
    parts = json.loads(backend.to_str())
    del parts["model"]["merges"][3]
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (foreign.wordpiece, "llama.cpp has no tokenizer like this one (WordPiece)"),
        (foreign.word_level, "llama.cpp has no tokenizer like this one (WordLevel)"),
        (foreign.dropping_bpe, "fail on characters that they do not know"),
        (lambda: foreign.unigram(None), "needs an unknown token"),
        (lambda: foreign.byte_level(prefix=True), "does not split text into words as this"),
        (strict_merges, "cannot merge this tokenizer's pieces in the order of its merges"),
        (lambda: char_tokenizer("a\u2581"), "the text has the character U+2581"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], tokenizers.Tokenizer | Tokenizer],
    said: str,
) -> None:
    made = make()
    tokenizer = made if isinstance(made, Tokenizer) else foreign.as_tokenizer(made)
    model = saved(tmp_path / "m", tokenizer)
    assert export(model, tmp_path / "a.gguf") == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith(f"export: export.model={model}: ")
    assert err.count("\n") == 1 and not (tmp_path / "a.gguf").exists()
    assert export(model, tmp_path / "a", "export.format=hf") == 0


def test_rows_without_a_token_are_named_and_tokens_without_a_row_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer)
    save_pretrained(model, tmp_path / "m", eos_token_id=0)
    tokenizer.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    for rows, code in ((tokenizer.vocab_size + 2, 0), (tokenizer.vocab_size - 1, 2)):
        weights = load_file(path)
        weights["transformer.wte.weight"] = torch.ones(rows, 32)
        save_file(weights, path)
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        assert export(tmp_path / "m", tmp_path / f"{rows}.gguf") == code
    found = vocabulary(tmp_path / f"{tokenizer.vocab_size + 2}.gguf")
    assert found["tokens"][-2:] == ["[PAD284]", "[PAD285]"]
    assert found["token_type"][-2:] == [5, 5]


@pytest.mark.parametrize(
    "make",
    [
        small_tokenizer,
        lambda: foreign.as_tokenizer(foreign.llama()),
        lambda: foreign.as_tokenizer(foreign.unigram("<unk>")),
    ],
)
def test_a_special_token_at_the_end_needs_no_row(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    model = saved(tmp_path / "m", make())
    assert export(model, tmp_path / "m.gguf") == 0
    padded = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    padded.add_special_tokens({"pad_token": "<added>"})
    padded.save_pretrained(model)
    assert export(model, tmp_path / "padded.gguf") == 0
    assert vocabulary(tmp_path / "padded.gguf") == vocabulary(tmp_path / "m.gguf")
    assert export(model, tmp_path / "hf", "export.format=hf") == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert exported.pad_token == "<added>"


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_weights_that_the_network_has_not_are_refused(
    form: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "model.safetensors"
    save_file({**load_file(path), "transformer.h.0.attn.c_attn.lora_A": torch.ones(4, 16)}, path)
    assert export(model, tmp_path / f"out.{form}", f"export.format={form}") == 2
    out, err = capsys.readouterr()
    assert "c_attn.lora_A is not a weight of this network" in err
    assert out == "" and "Traceback" not in err and not (tmp_path / f"out.{form}").exists()


def test_a_folder_whose_tokenizer_does_not_fit_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, path = tmp_path / "out", model / "tokenizer.json"
    parts = path.read_text("utf-8")
    larger = tokenizers.Tokenizer.from_str(parts)
    larger.add_tokens(["<extra>"])
    rows = small_tokenizer().vocab_size
    for text, said in (
        (parts[:200], "tokenizer.json: not a tokenizer: not JSON"),
        (larger.to_str(), f"has {rows + 1} tokens, but the model's embedding has only {rows} rows"),
    ):
        path.write_text(text, "utf-8")
        assert export(model, output, "export.format=hf") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"export: export.model={model}: ") and said in err
        assert err.count("\n") == 1 and not output.exists()
    path.write_text(parts, "utf-8")
    (model / "generation_config.json").write_text('{"eos_token_id": "no"}')
    assert export(model, output, "export.format=hf") == 2
    assert (
        "generation_config.json: eos_token_id='no' is neither a token id" in capsys.readouterr().err
    )


def test_an_output_that_cannot_be_is_refused_and_none_is_overwritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken.gguf").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.gguf").symlink_to("nowhere")
    cases = [
        (["export.output_path=s3://bucket/a.gguf"], "name a file on this machine"),
        ([f"export.output_path={tmp_path}/a.bin"], "ends in .gguf, such as book-fp16.gguf"),
        ([f"export.output_path={tmp_path}/folder"], f"such as {tmp_path}/folder/book-fp16.gguf"),
        ([f"export.output_path={tmp_path}/taken.gguf"], "exists already"),
        ([f"export.output_path={tmp_path}/link.gguf"], "exists already"),
        ([f"export.output_path={tmp_path}/taken.gguf/a.gguf"], "is not a folder"),
        (["export.format=hf"], "name the folder to write, such as book-fp16"),
        (["export.format=hf", f"export.output_path={tmp_path}/folder"], "exists already"),
        (["export.format=hf", "export.precision=q8_0"], "takes fp32, fp16, bf16, int8 or int4"),
        (["export.dtype=bf16"], "did you mean export.precision?"),
    ]
    for words, said in cases:
        for dry_run in ([], ["--dry-run"]):
            assert run("export", [f"export.model={model}", *words, *dry_run]) == 2
            out, err = capsys.readouterr()
            assert said in err and out == "" and "Traceback" not in err
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []


def test_all_mistakes_are_told_at_once_each_under_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", [f"storage_path={tmp_path}", "name=bok"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"export: name=bok: no such run in {tmp_path}")
    assert (
        second == "export.output_path is not set: name the file to write, such as model-fp16.gguf"
    )


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_numbers_that_do_not_fit_are_refused_and_leave_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    for number, said in ((1e5, "choose export.precision=bf16"), (float("nan"), "is not finite")):
        weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = number
        save_file(weights, path)
        assert export(model, tmp_path / "new" / "a.gguf", f"export.format={form}") == 2
        assert said in capsys.readouterr().err
        assert sorted(one.name for one in tmp_path.iterdir()) == ["book"]


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    with files_up_to(20_000):
        assert export(model, tmp_path / "new" / "a.gguf", f"export.format={form}") == 1
    err = capsys.readouterr().err
    assert "cannot write" in err and "Traceback" not in err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["book"]


def test_a_dry_run_says_size_and_files_without_torch_or_ray(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gptray.entry_points import run; code = run('export', sys.argv[1:]); "
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    words = [f"export.model={model}", f"export.output_path={tmp_path}/out", "export.format=hf"]
    command = [sys.executable, "-c", code, *words, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])["plan"]
    assert plan["output"] == f"{tmp_path}/out" and plan["size"] == "56.6 kB"
    assert plan["files"].split()[:2] == ["config.json", "generation_config.json"]
    assert not (tmp_path / "out").exists()
