"""Model folders from elsewhere: refused in a sentence, or right; nothing of theirs is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptray.config import UserError, load_config
from gptray.generation.loading import open_engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.jobs.models import open_model
from tests.damage import (
    DEEP,
    NO_JSON,
    Damage,
    assert_a_sentence,
    cut,
    fields,
    folder_at,
    gone,
    link_at,
    pipe_at,
    text,
)

pytestmark = pytest.mark.usefixtures("in_time")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, SPECIAL = "tokenizer.json", "special_tokens_map.json"
SETTINGS = "tokenizer_config.json"
BIAS, WTE = "transformer.h.0.mlp.c_fc.bias", "transformer.wte.weight"


def written_by(folder: Path) -> str:
    """What a model folder's model writes, all checks of a job made."""
    open_model(folder, key="serve.model")
    config = load_config(None, ["generate.precision=fp32", "generate.backend=torch"])
    engine, tokenizer = open_engine(folder, config, max_batch_size=1)
    sampling = Sampling(max_new_tokens=4, temperature=0.0, min_new_tokens=1)
    return engine.run([Sequence(tokenizer.encode("the cat"), sampling)])[0].text


def header(**tensors: Any) -> Damage:
    """Change entries of the weights' header."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        for name, values in tensors.items():
            entries[name.replace("__", ".")] |= values
        text_of = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", len(text_of)) + text_of + raw[8 + length :]
        )

    return damage


def bias(**values: Any) -> Damage:
    return header(**{BIAS.replace(".", "__"): values})


def raw_header(content: bytes, length: int | None = None) -> Damage:
    size = len(content) if length is None else length
    return text(WEIGHTS, struct.pack("<Q", size) + content)


def stored_as(dtype: torch.dtype, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {name: one.to(dtype) for name, one in load_file(folder / WEIGHTS).items()}
        for name, value in changes.items():
            tensors[name.replace("__", ".")] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def index(value: Any) -> Damage:
    content = json.dumps({"weight_map": value})
    return lambda folder: (gone(WEIGHTS)(folder), text(INDEX, content)(folder))


def shard(damage: Damage) -> Damage:
    return lambda folder: (index({"a": "s.safetensors"})(folder), damage(folder))


def tokenizer(**parts: Any) -> Damage:
    return fields(TOKENIZER, **parts)


def vocabulary(**ids: int) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        content["model"]["vocab"].update(ids)
        (folder / TOKENIZER).write_text(json.dumps(content))

    return damage


def end_of_text_at(number: int) -> Damage:
    def damage(folder: Path) -> None:
        vocabulary(**{"<|endoftext|>": number})(folder)
        content = json.loads((folder / TOKENIZER).read_text())
        content["added_tokens"][0]["id"] = number
        (folder / TOKENIZER).write_text(json.dumps(content))

    return damage


def replace(old: dict[str, str], new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


TEN_TIMES = replace({"String": "x"}, "x" * 10)
# What a config.json may say of a number that the weights contradict, or that no network has.
NUMBERS: dict[str, list[Any]] = {
    "n_layer": [10**9, 200_000, 10**400, 0, -1, 3, None, "x", [], {}],
    "n_positions": [10**12, 65, 0, None],
    "vocab_size": [10**12, 10**6, 0, -5, None, "x"],
    "n_inner": [10**12, 7],
    "n_embd": [10**9, 64, 0, None],
    "n_head": [0, -2, 3, None],
    "layer_norm_epsilon": [float("nan"), float("inf"), 0, "x", None],
    "resid_pdrop": [5, -1, None, float("nan")],
    "model_type": [["gpt2"], {}, None, "llama", "x" * 10_000],
    "activation_function": [["x"], {}, "relu", "x" * 10_000],
    "tie_word_embeddings": [False, "no", []],
}
WRONG_INDICES: dict[str, object] = {
    "list": ["x"], "null": None, "empty": {}, "of lists": {"a": ["x"]},
    "of objects": {"a": {}}, "of mixed kinds": {"a": "x", "b": 1}, "of nulls": {"a": None},
    "parent": {"a": "../other.safetensors"}, "absolute": {"a": "/etc/passwd"},
    "dots": {"a": ".."}, "no name": {"a": ""}, "nul": {"a": "x\0.safetensors"},
    "long": {"a": "x" * 5000 + ".safetensors"}, "missing": {"a": "gone.safetensors"},
}  # fmt: skip
REFUSED: dict[str, Damage] = {
    **{f"{CONFIG} {name}": text(CONFIG, raw) for name, raw in NO_JSON.items()},
    **{
        f"{key}={value!r:.12}": fields(CONFIG, **{key: value})
        for key, values in NUMBERS.items()
        for value in values
    },
    "config is a folder": folder_at(CONFIG),
    "config is a pipe": pipe_at(CONFIG),
    "config is another file of the machine": link_at(CONFIG, "/etc/passwd"),
    "weights empty": text(WEIGHTS, b""),
    "weights cut in the header": cut(WEIGHTS, 1),
    "weights cut in the data": cut(WEIGHTS, 6),
    "weights are a pickle": text(WEIGHTS, pickle.dumps({"a": 1})),
    "weights are a pipe": pipe_at(WEIGHTS),
    "weights only as a pickle": lambda f: (gone(WEIGHTS)(f), text("pytorch_model.bin", b"\x80")(f)),
    "header length 2^63": raw_header(b"{}", 2**63),
    "header length 2^64-1": raw_header(b"{}", 2**64 - 1),
    "header of 90 MB": raw_header(b"{}" + b" " * 90_000_000),
    "header deep": raw_header(DEEP.encode()),
    "header is a list": raw_header(b"[]"),
    "header of an entry that is a number": raw_header(b'{"a": 1}'),
    "shape overflows": bias(shape=[2**32, 2**32]),
    "shape huge": bias(shape=[2**62]),
    "shape negative": bias(shape=[-1]),
    "shape is text": bias(shape="x"),
    "offset negative": bias(data_offsets=[-1, 10]),
    "offset beyond the end": bias(data_offsets=[0, 10**12]),
    "offset of another weight": bias(data_offsets=[0, 512]),
    "dtype of another width": bias(dtype="F64"),
    "dtype unknown": bias(dtype="PICKLE"),
    "dtype is a number": bias(dtype=1),
    **{
        f"stored as {dtype}": stored_as(dtype)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    },
    "weights not finite": stored_as(
        torch.float32, **{WTE.replace(".", "__"): torch.full((320, 32), float("nan"))}
    ),
    **{
        f"index {name}": index(value)
        for name, value in WRONG_INDICES.items()
    },
    "shard is a pipe": shard(pipe_at("s.safetensors")),
    "shard is endless": shard(link_at("s.safetensors", "/dev/zero")),
    "shard is a loop": shard(link_at("s.safetensors", "s.safetensors")),
    **{f"{TOKENIZER} {name}": text(TOKENIZER, raw) for name, raw in NO_JSON.items()},
    **{f"{SPECIAL} {name}": text(SPECIAL, raw) for name, raw in NO_JSON.items()},
    "no tokenizer": lambda f: [gone(name)(f) for name in (TOKENIZER, SPECIAL, SETTINGS)],
    "end of text that is none": lambda f: (
        text(SPECIAL, '{"eos_token": "nope"}')(f), text(SETTINGS, "{}")(f)
    ),
    "end of text beyond the model": end_of_text_at(5000),
    "token of id 2^31": vocabulary(zz=2**31),
    "merge of unknown tokens": lambda f: text(
        TOKENIZER, (f / TOKENIZER).read_text().replace('"merges":[', '"merges":[["nope","na"],', 1)
        .replace('"merges": [', '"merges": [["nope","na"],', 1)
    )(f),
    "normalizer x 1000": tokenizer(normalizer=replace({"Regex": ""}, "x" * 1000)),
    "normalizer x 10^9": tokenizer(
        normalizer={"type": "Sequence", "normalizers": [TEN_TIMES] * 9}
    ),
    "decoder x 10^9": tokenizer(decoder={"type": "Sequence", "decoders": [TEN_TIMES] * 9}),
    "normalizer that panics": tokenizer(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "regular expression without end": tokenizer(
        pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False,
        }
    ),
    "vocabulary empty": tokenizer(
        model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}, added_tokens=[]
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_a_hostile_or_damaged_model_is_refused_in_a_sentence(
    model_dir: Path, tmp_path: Path, damage: Damage
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "m")
    damage(folder)
    with pytest.raises(UserError) as told:
        written_by(folder)
    assert_a_sentence(told.value)
    assert "\n" not in str(told.value) and str(folder) in str(told.value)


class Boom:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def code(folder: Path) -> None:
    """Put a module that leaves a mark into a folder, and name it wherever that can be."""
    mark = f"import os; os.mkdir({str(folder / 'canary')!r})\n"
    (folder / "evil.py").write_text(f"{mark}class Evil: pass\n")
    names = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    names["AutoModelForCausalLM"] = "evil.Evil"
    fields(CONFIG, auto_map=names, trust_remote_code=True)(folder)
    fields(SETTINGS, auto_map=names, trust_remote_code=True, tokenizer_class="Evil")(folder)


def pickles(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Boom(folder / "canary")))


def template(folder: Path) -> None:
    command = f"{{{{ cycler.__init__.__globals__.os.mkdir('{folder / 'canary'}') }}}}"
    fields(SETTINGS, chat_template=command)(folder)


HARMLESS: dict[str, Damage] = {
    "code in the folder": code,
    "pickles beside the weights": pickles,
    "a template that runs code": template,
    "unknown keys": fields(CONFIG, **{"\ud800": 1, "x": DEEP[:100]}),
    "an initializer of 1e308": fields(CONFIG, initializer_range=1e308),
    "stored in fp64": stored_as(torch.float64),
    "a pipe beside the tokenizer": pipe_at("vocab.json"),
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_what_stands_beside_a_model_changes_nothing_and_is_never_run(
    model_dir: Path, tmp_path: Path, damage: Damage
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "m")
    damage(folder)
    assert written_by(folder) == written_by(model_dir)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("names", [[TOKENIZER, SPECIAL], [SPECIAL]], ids=["no tokenizer", "no end"])
def test_a_tokenizers_own_code_is_not_run_where_transformers_opens_it(
    model_dir: Path, tmp_path: Path, names: list[str]
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "m")
    code(folder)
    for name in names:
        (folder / name).unlink()
    try:
        written_by(folder)
    except UserError as error:
        assert_a_sentence(error)
    assert not (folder / "canary").exists()
