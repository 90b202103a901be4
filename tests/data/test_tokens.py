from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptray.data.shards import ShardEncoder, ShardWriter, shard_dtype
from gptray.data.tokenizer import Tokenizer, char_tokenizer
from gptray.data.tokens import FORMAT_VERSION, DamagedData, TokenData
from tests.damage import NO_JSON, Damage, fields, flipped, folder_at, pipe_at, text
from tests.data.texts import DOCUMENTS

SHARDS = {"train": [list(range(7)), [100], list(range(20, 25))], "val": [[1, 2, 3]]}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder made by hand, byte by byte."""
    return make_folder(tmp_path / "data", "uint16")


def make_folder(folder: Path, dtype: str) -> Path:
    folder.mkdir()
    tokenizer = char_tokenizer("ab")
    tokenizer.save(folder / "tokenizer")
    splits: dict[str, Any] = {}
    for name, shards in SHARDS.items():
        entries = []
        for number, ids in enumerate(shards):
            content = b"".join(i.to_bytes(2 if dtype == "uint16" else 4, "little") for i in ids)
            file = f"{name}-{number:05d}.bin"
            (folder / file).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entries.append({"file": file, "tokens": len(ids), "sha256": digest})
        tokens = sum(map(len, shards))
        splits[name] = {
            "documents": 1,
            "tokens": tokens,
            "bytes": 5,
            "lost_bytes": 0,
            "shards": entries,
        }
    manifest = {
        "format": FORMAT_VERSION,
        "dtype": dtype,
        "splits": splits,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_id,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_slice_crosses_shards_rightly(tmp_path: Path, dtype: str) -> None:
    train = TokenData.open(make_folder(tmp_path / "data", dtype)).train
    whole = [i for shard in SHARDS["train"] for i in shard]
    assert len(train) == train.tokens == len(whole)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            piece = train.slice(start, stop)
            assert piece.dtype == np.int64
            assert piece.tolist() == whole[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 14), (14, 14)])
def test_slice_outside_is_an_index_error(data_dir: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        TokenData.open(data_dir).train.slice(start, stop)


def test_open_reads_what_the_manifest_says(data_dir: Path) -> None:
    data = TokenData.open(data_dir)
    assert data.test is None
    assert (data.val.tokens, data.val.bytes, data.val.documents) == (3, 5, 1)
    assert (data.vocab_size, data.eos_id) == (3, 2)
    assert data.tokenizer.encode("ba") == [1, 0]
    data.verify()


def test_fingerprint_follows_the_content_not_the_place(data_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    assert TokenData.open(copy).fingerprint == TokenData.open(data_dir).fingerprint
    text = (copy / "manifest.json").read_text()
    entry = json.loads(text)["splits"]["val"]["shards"][0]["sha256"]
    (copy / "manifest.json").write_text(text.replace(entry, "0" * 64))
    assert TokenData.open(copy).fingerprint != TokenData.open(data_dir).fingerprint


@pytest.mark.parametrize("file", ["manifest.json", "train-00001.bin", "tokenizer/tokenizer.json"])
def test_missing_file_is_damage(data_dir: Path, file: str) -> None:
    (data_dir / file).unlink()
    with pytest.raises(DamagedData, match=Path(file).name):
        TokenData.open(data_dir)


def test_truncated_file_is_damage(data_dir: Path) -> None:
    path = data_dir / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedData, match=r"train-00002\.bin has 9 bytes, not 10"):
        TokenData.open(data_dir)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 0}', ""])
def test_damaged_manifest_is_damage(data_dir: Path, content: str) -> None:
    (data_dir / "manifest.json").write_text(content)
    with pytest.raises(DamagedData):
        TokenData.open(data_dir)


@pytest.mark.parametrize("file", ["val-00000.bin", "tokenizer/tokenizer.json"])
def test_verify_finds_one_flipped_bit(data_dir: Path, file: str) -> None:
    path = data_dir / file
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    data = TokenData.open(data_dir)
    with pytest.raises(DamagedData, match=Path(file).name):
        data.verify()


def test_dtype_holds_every_id() -> None:
    assert [shard_dtype(size) for size in (1, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return char_tokenizer("".join(DOCUMENTS))


def test_writer_describes_what_it_wrote(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with ShardWriter(path, ShardEncoder(tokenizer)) as writer:
        for text in DOCUMENTS:
            writer.add(text[:3], begins=True, ends=False)
            writer.add(text[3:], begins=False, ends=True)
    ids = [i for text in DOCUMENTS for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert np.fromfile(path, dtype="<u2").tolist() == ids
    assert writer.shard is not None
    entry = writer.shard.entry
    assert (entry["file"], entry["tokens"]) == ("x.part", len(ids))
    assert entry["bytes"] == len("".join(DOCUMENTS).encode())
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_writer_without_tokens_leaves_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.part", ShardEncoder(tokenizer)) as writer:
        pass
    assert writer.shard is None
    assert list(tmp_path.iterdir()) == []


MANIFESTS = {
    **{name: text("manifest.json", raw) for name, raw in NO_JSON.items()},
    **{
        f"{key}={value!r:.12}": fields("manifest.json", **{key: value})
        for key, value in (
            ("format", 2), ("dtype", "object"), ("dtype", 1), ("splits", []), ("splits", {}),
            ("splits", {"train": 1, "val": 1}), ("tokenizer", None), ("tokenizer", {}),
        )
    },
    "a folder": folder_at("manifest.json"),
    "a pipe": pipe_at("manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_damage(data_dir: Path, damage: Damage) -> None:
    damage(data_dir)
    with pytest.raises(DamagedData):
        TokenData.open(data_dir)


@pytest.mark.parametrize("tenth", range(11))
@pytest.mark.parametrize("name", ["train-00000.bin", "train-00002.bin", "val-00000.bin"])
def test_no_bit_turns_unseen_by_verify(data_dir: Path, name: str, tenth: int) -> None:
    flipped(name, tenth)(data_dir)
    with pytest.raises(DamagedData, match=rf"{name} has changed \(sha256\)"):
        TokenData.open(data_dir).verify()
