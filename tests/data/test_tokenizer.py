from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptray.config import UserError
from gptray.data.boundary import chunks
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.data.tokenizer_files import tokenizer_sha256
from tests.data.texts import CHINESE, DOCUMENTS, EMOJI, ENGLISH, KOREAN, many_documents


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(many_documents(60), 400)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return char_tokenizer("".join(DOCUMENTS))


@pytest.fixture(params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.getfixturevalue(request.param)
    return made


@pytest.mark.parametrize("text", DOCUMENTS)
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_knows_text_unlike_its_training(bpe: Tokenizer) -> None:
    text = "".join(map(chr, range(0x250))) + "\U0010ffff\u0378"
    assert bpe.decode(bpe.encode(text)) == text


def test_special_tokens_in_text_are_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_auto_tokenizer_opens_the_folder_and_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config

    tokenizer.save(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    GPT2Config(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    beside_a_model = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for opened in (plain, beside_a_model):
        assert len(opened) == tokenizer.vocab_size
        assert opened.eos_token_id == tokenizer.eos_id
        for text in (KOREAN, EMOJI, ENGLISH, CHINESE):
            assert opened(text)["input_ids"] == tokenizer.encode(text)
            assert opened.decode(tokenizer.encode(text)) == text


def test_saved_folder_loads_as_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "model")
    content = (tmp_path / "model" / "tokenizer.json").read_bytes()
    for folder in (tmp_path, tmp_path / "model"):  # a run folder, a model folder
        loaded = Tokenizer.load(folder)
        assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256(content).hexdigest()
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.eos_id == tokenizer.eos_id
        assert loaded.encode(ENGLISH) == tokenizer.encode(ENGLISH)
        assert loaded.eos_id not in loaded.encode("<|endoftext|>")


def test_bpe_training_is_deterministic_and_of_the_size_asked() -> None:
    first, again = (train_bpe(many_documents(60), 300) for _ in range(2))
    assert first.sha256 == again.sha256
    assert first.vocab_size == 300
    assert train_bpe(["ab"], 300).vocab_size == 258  # bytes, end of text, "ab"


def test_char_ids_are_nanogpts(char: Tokenizer) -> None:
    text = "hello there, world"
    tokenizer = char_tokenizer(text)
    nanogpt = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [nanogpt[character] for character in text]
    assert tokenizer.eos_id == len(nanogpt) == tokenizer.vocab_size - 1


def test_unknown_character_is_named(char: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"does not know '\u20ac' \(U\+20AC\)"):
        char.encode("1 \u20ac")


def wordpiece_like(folder: Path, **settings: Any) -> Path:
    """A foreign tokenizer: lower case, words, no way back to the exact text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "[EOS]": 2}, "[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_padding(length=9)
    backend.enable_truncation(2)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_hf_folder_brings_its_end_of_text(tmp_path: Path) -> None:
    loaded = Tokenizer.load(wordpiece_like(tmp_path, eos_token={"content": "[EOS]"}))
    assert (loaded.vocab_size, loaded.eos_id) == (3, 2)
    assert loaded.encode("One one ONE two") == [1, 1, 1, 0]  # neither padded nor truncated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"names no end-of-text token; choose one with data\.eos_token, such as '\[EOS\]'$"),
        ({"eos_token": "</s>"}, "'</s>' is not in its vocabulary; choose one with data.eos_token"),
    ],
)
def test_tokenizer_without_end_of_text_is_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.load(wordpiece_like(tmp_path, **settings))


def test_vocabulary_and_merges_become_a_tokenizer_json(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    source = tmp_path / "gpt2"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in saved["model"]["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    loaded = Tokenizer.load(source)
    assert loaded.eos_id == bpe.eos_id
    assert [loaded.encode(text) for text in DOCUMENTS] == [bpe.encode(text) for text in DOCUMENTS]
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(KOREAN) == bpe.encode(KOREAN)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bpee", r"no such folder here and not in the hub's cache .*; did you mean bpe\?"),
        ("Char", r".*; did you mean char\?"),
        ("./nowhere", "no such folder or file"),
        ("/no/such/folder", "no such folder or file"),
        ("no/tokenizer.json", "no such folder or file"),
        (__file__, "is a file; name a folder or a tokenizer.json"),
    ],
)
def test_wrong_tokenizer_names_the_nearest(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^data.tokenizer={source}: {message}"):
        Tokenizer.load(source)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)


def test_damaged_tokenizer_json_is_named(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content[:-50])
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_folder_identity_follows_its_content(bpe: Tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        bpe.save(tmp_path / name)
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")
    (tmp_path / "b" / "README.txt").write_text("no part of it")
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    assert tokenizer_sha256(tmp_path / "a") != tokenizer_sha256(tmp_path / "b")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def with_pattern(pattern: str, bpe: Tokenizer, folder: Path) -> Tokenizer:
    """The BPE tokenizer with another family's way to cut text into words."""
    bpe.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("pattern", ["", LLAMA3, QWEN2])
def test_chunks_have_the_tokens_of_the_whole(bpe: Tokenizer, tmp_path: Path, pattern: str) -> None:
    tokenizer = with_pattern(pattern, bpe, tmp_path) if pattern else bpe
    assert tokenizer.cuts_at_boundaries()
    for text in [*DOCUMENTS, "\n".join(DOCUMENTS), " ".join(DOCUMENTS)]:
        parts = [i for chunk in chunks(text) for i in tokenizer.encode(chunk)]
        assert parts == tokenizer.encode(text)


def test_tokenizer_that_needs_whole_texts_is_told_apart(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"\u2581": 0, "x": 1, "e": 2}, "x"))
    backend.normalizer = normalizers.Prepend("\u2581")
    backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "e"}')
    assert not Tokenizer.load(tmp_path).cuts_at_boundaries()


def test_a_gpt2_folder_whose_files_name_no_special_token_opens(tmp_path: Path) -> None:
    # As on the hub: that the end of text is <|endoftext|> is known to GPT-2's tokenizer class.
    trained = train_bpe(["some text to train on"] * 3, 300)
    trained.save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_id == trained.eos_id
    assert loaded.encode("some text") == trained.encode("some text")
