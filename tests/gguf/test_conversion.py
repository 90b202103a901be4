"""GGUF files as models: those that export wrote, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gptray import LLM
from gptray.config import UserError, load_config
from gptray.data.tokenizer import Tokenizer
from gptray.entry_points import run
from gptray.gguf.layout import read_header
from gptray.jobs.folders.run_folder import resolve
from gptray.model.hf import load_pretrained, save_pretrained
from gptray.model.shape import model_folder
from gptray.native.backend import why_not_native
from gptray.storage.stored import Unreadable
from tests.data import foreign
from tests.generation.models import random_gpt, small_tokenizer
from tests.gguf.copies import copying
from tests.native.cache import own_cache

NOT_IN_GGUF = {"dropout", "initializer_range"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not_native(use_gpu=False) is None:
        own_cache(tmp_path / "cache", monkeypatch)  # has the native library
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def exported(folder: Path, tokenizer: Tokenizer, precision: str = "fp32") -> Path:
    model = random_gpt(tokenizer, n_inner=64)
    save_pretrained(model, folder / "m", eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder / "m")
    words = [f"export.model={folder}/m", f"export.output_path={folder}/m.gguf"]
    assert run("export", [*words, f"export.precision={precision}"]) == 0
    return folder / "m.gguf"


@pytest.mark.parametrize("precision", [*DTYPES, "q8_0"])
def test_a_model_comes_back_from_gguf(tmp_path: Path, precision: str) -> None:
    path = exported(tmp_path, small_tokenizer(), precision)
    original, found = load_pretrained(tmp_path / "m"), load_pretrained(path)
    read = {one.name: one for one in gguf.GGUFReader(path).tensors}
    pairs = zip(original.state_dict().items(), found.state_dict().values(), strict=True)
    for (name, weight), copy in pairs:
        if weight.ndim == 1 or "wpe" in name:
            assert torch.equal(copy, weight), name
        elif precision in DTYPES:
            assert torch.equal(copy, weight.to(DTYPES[precision]).float()), name
        elif "wte" in name:
            one = read["token_embd.weight"]
            assert np.array_equal(copy.numpy(), gguf.dequantize(one.data, one.tensor_type))
        else:
            assert (copy - weight).abs().max() < 0.02 and not torch.equal(copy, weight)
    assert found.config.model_dump(exclude=NOT_IN_GGUF) == (
        original.config.model_dump(exclude=NOT_IN_GGUF)
    )
    outputs = [
        LLM(str(place)).generate(["the cat"], temperature=0, max_new_tokens=9)[0].text
        for place in (tmp_path / "m", path)
    ]
    assert precision != "fp32" or outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "make", [small_tokenizer, lambda: foreign.as_tokenizer(foreign.byte_level())]
)
def test_a_byte_level_tokenizer_comes_back(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    found = Tokenizer.load(exported(tmp_path, tokenizer))
    assert found.names == tokenizer.names and found.eos_id == tokenizer.eos_id
    for text in ("the cat  sees\n\n1234", "\uc61b\ub0a0", "<|endoftext|>", "it's"):
        assert found.encode(text) == tokenizer.encode(text)


def requantized(path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The file with its matrices in another type, as tools of llama.cpp write it."""
    output = path.with_suffix(f".{kind.name}.gguf")
    with copying(path, output) as (reader, writer):
        for tensor in reader.tensors:
            if tensor.data.ndim == 2 and tensor.name != "position_embd.weight":
                data = gguf.quantize(tensor.data, kind)
                writer.add_tensor(tensor.name, data, raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, np.array(tensor.data))
    return output


def test_types_that_export_does_not_write_are_read_too(tmp_path: Path) -> None:
    path = exported(tmp_path, small_tokenizer())
    name = "transformer.h.0.mlp.c_fc.weight"
    original = load_pretrained(path).state_dict()[name]
    for kind, most in (
        (gguf.GGMLQuantizationType.Q5_1, 0.06),
        (gguf.GGMLQuantizationType.Q4_0, 0.2),
    ):
        found = load_pretrained(requantized(path, kind)).state_dict()[name]
        difference = float((found - original).abs().max())
        assert 0 < difference < most * float(original.abs().max())


def test_a_run_starts_from_gguf_and_keeps_its_path(tmp_path: Path) -> None:
    path = exported(tmp_path, small_tokenizer())
    words = [f"storage_path={tmp_path}", f"model.init_from={path}", "train.block_size=32"]
    config = resolve(load_config(None, words))
    assert config.model.init_from == config.data.tokenizer == str(path)
    assert (config.model.n_embd, config.model.n_inner, config.model.n_positions) == (32, 64, 64)


def test_a_folder_is_made_once_for_each_state_of_a_file(tmp_path: Path) -> None:
    path = exported(tmp_path, small_tokenizer())
    first = model_folder(path)
    assert model_folder(path) == first and {one.name for one in first.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    os.utime(first, (0, 0))
    code = (
        "import sys; from gptray.model.shape import model_folder; print(model_folder(sys.argv[1]))"
    )
    again = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert again.stdout.decode().strip() == str(first)
    assert first.stat().st_mtime > 0, "what is used is not the first to be removed"
    path.unlink()
    exported_again = tmp_path / "again"
    exported_again.mkdir()
    exported(exported_again, small_tokenizer(), "fp16").rename(path)
    assert model_folder(path) != first


@pytest.mark.parametrize(
    ("fields", "kept", "said"),
    [
        ({"split.count": 3, "split.no": 0}, slice(9), "it is one of 3 parts of a model; llama.cpp"),
        ({"split.count": 3, "split.no": 1}, slice(9, 12), "llama-gguf-split --merge joins them"),
        ({"general.type": "mmproj"}, slice(4), "general.type is 'mmproj'; only a 'model' can be"),
    ],
)
def test_what_is_no_whole_model_is_told_as_that(
    tmp_path: Path, fields: dict[str, object], kept: slice, said: str
) -> None:
    path = tmp_path / "part.gguf"
    with copying(exported(tmp_path, small_tokenizer()), path, fields) as (reader, writer):
        for tensor in list(reader.tensors)[kept]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    with pytest.raises(UserError, match=re.escape(f"{path}: it")) as told:
        model_folder(path)
    assert said in str(told.value)


def test_a_folder_of_gguf_files_says_how_one_is_named(tmp_path: Path) -> None:
    exported(tmp_path, small_tokenizer()).rename(folder(tmp_path, "hub") / "m-Q8_0.gguf")
    with pytest.raises(UserError, match=r"this is not a model; name a file in it: m-Q8_0.gguf$"):
        model_folder(tmp_path / "hub")


def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (other(tmp_path / "phi.gguf", "phi2"), "architecture 'phi2' is not supported; gpt2, llama"),
        (other(tmp_path / "bare.gguf", "gpt2"), "it has no attention.head_count"),
        (other(tmp_path / "strange.gguf", "gpt2", tokens=True), "it has no attention.head_count"),
    ]
    for path, said in cases:
        capsys.readouterr()
        assert run("generate", [f"generate.model={path}", "sample.prompt=a"]) == 2
        err = capsys.readouterr().err
        assert f"{path}: " in err and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("job", "named"), [("generate", "generate.model"), ("train", "model.init_from")]
)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("gpt2.context_length", 1, "n_positions: Input should be greater than or equal to 2"),
        ("gpt2.block_count", 3, "n_layer=3, but the weights have 2 layers"),
        ("gpt2.feed_forward_length", 7, "c_fc.weight has shape [32, 64], but its header says"),
        ("gpt2.attention.layer_norm_epsilon", -1.0, "epsilon: Input should be greater than 0"),
    ],
)
def test_numbers_that_no_network_has_are_the_files_and_not_those_of_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
    job: str, named: str, key: str, value: float, said: str,
) -> None:  # fmt: skip
    path = tmp_path / "impossible.gguf"
    with copying(exported(tmp_path, small_tokenizer()), path, {key: value}) as (reader, writer):
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    capsys.readouterr()
    more = {"generate": ["sample.prompt=a"], "train": [f"storage_path={tmp_path}"]}
    assert run(job, [f"{named}={path}", *more[job]]) == 2
    err = capsys.readouterr().err
    assert f"{named}: {path}: " in err and said in err and str(tmp_path / "cache") not in err


def folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


def other(path: Path, architecture: str, *, tokens: bool = False) -> Path:
    """A file of another program's, with a tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b"])
        writer.add_token_types([1, 3])
        writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head(tensors: int, fields: int, rest: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends too early"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (head(0, 0, version=1), "its version is 1"),
        (head(1 << 60, 0), "claims to have"),
        (head(0, 1 << 60), "claims to have"),
        (head(0, 1, struct.pack("<Q", 1 << 62)), "ends too early"),
        (head(0, 1, field("a", 9, struct.pack("<IQ", 0, 1 << 60))), "ends too early"),
        (head(0, 1, field("a", 9, struct.pack("<IQ", 8, 1 << 60))), "ends too early"),
        (head(0, 1, field("a", 9, struct.pack("<IQ", 9, 3))), "an array of type 9"),
        (head(0, 1, field("a", 77, b"")), "a value of type 77"),
        (head(0, 1, field("\ud800".encode("utf-8", "surrogatepass").hex(), 8, b"\1")), "early"),
        (head(0, 1, field("a", 8, struct.pack("<Q", 1) + b"\xff")), "invalid start byte"),
        (head(1, 0, struct.pack("<QI", 0, 1 << 30)), "dimensions"),
        (head(0, 1, field("general.alignment", 4, bytes(4))), "its alignment is 0"),
    ],
)
def test_a_damaged_or_hostile_header_is_refused_at_once(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=said):
        read_header(path)
    with pytest.raises(UserError, match=f"{path}: "):
        model_folder(path)


def test_every_truncation_and_shape_that_lies_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, small_tokenizer())
    whole = path.read_bytes()
    for size in (10, 100, 1000, 5000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            model_folder(path)
    rows = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4
    for width, height, said in (
        (32, 1 << 40, "is outside the file"),
        (0, 300, "has shape"),
        (32, 0, "has shape"),
    ):
        shape = struct.pack("<QQ", width, height)
        path.write_bytes(whole[:rows] + shape + whole[rows + 16 :])
        with pytest.raises(UserError, match=f"token_embd.weight {said}"):
            model_folder(path)


def test_the_chat_template_comes_back(tmp_path: Path) -> None:
    exported(tmp_path, small_tokenizer()).unlink()
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    words = [f"export.model={tmp_path}/m", f"export.output_path={tmp_path}/m.gguf"]
    assert run("export", words) == 0
    settings = model_folder(tmp_path / "m.gguf") / "tokenizer_config.json"
    assert json.loads(settings.read_text())["chat_template"] == "{{ messages }}"
