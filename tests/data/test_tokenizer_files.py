"""The forms in which users keep a tokenizer, and the token that ends its texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken

from gptray.config import UserError
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import tokenizer_path, tokenizer_sha256
from gptray.data.trust import UnreadableText
from tests.data import foreign

TEXT = "the cat sees a dog. \ud55c\uad6d\n"


def bare(folder: Path) -> Path:
    """vocab.json and merges.txt alone, as ByteLevelBPETokenizer.save_model leaves them."""
    folder.mkdir()
    foreign.byte_level().model.save(str(folder))
    return folder


def test_tokenizer_json_may_be_named_itself(tmp_path: Path) -> None:
    folder = foreign.save(foreign.byte_level(), tmp_path / "a", {"eos_token": "<|endoftext|>"})
    named = Tokenizer.load(folder / "tokenizer.json")
    assert named.sha256 == Tokenizer.load(folder).sha256
    assert tokenizer_path(str(folder / "tokenizer.json")) == folder
    other = (folder / "tokenizer.json").rename(folder / "mine.json")
    assert Tokenizer.load(other).encode(TEXT) == named.encode(TEXT)
    assert tokenizer_sha256(other) != tokenizer_sha256(folder)


def test_vocabulary_and_merges_alone_are_read_as_gpt2s(tmp_path: Path) -> None:
    backend = foreign.byte_level()
    backend.encode_special_tokens = True
    loaded = Tokenizer.load(bare(tmp_path / "gpt2"))
    assert loaded.eos_token == "<|endoftext|>"
    for text in (TEXT, "a <|endoftext|> b"):
        assert loaded.encode(text) == backend.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    loaded.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").sha256 == loaded.sha256


def test_vocabulary_and_merges_may_come_with_the_names_of_special_tokens(tmp_path: Path) -> None:
    folder = bare(tmp_path / "gpt2")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "!"}')
    assert Tokenizer.load(folder).eos_token == "!"


def test_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    folder = bare(tmp_path / "gpt2")
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab["\u0100"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match="1 of the 256 bytes are not in the vocabulary"):
        Tokenizer.load(folder)


def test_a_well_known_end_of_text_is_taken_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = foreign.save(foreign.wordpiece(), tmp_path / "bert")
    with caplog.at_level(logging.WARNING, "gptray"):
        assert {Tokenizer.load(folder).eos_token for _ in range(3)} == {"[SEP]"}
    assert [record.message for record in caplog.records] == [
        f"data.tokenizer={folder} names no end-of-text token; using '[SEP]' "
        "(set data.eos_token to choose another)"
    ]


def test_two_well_known_ends_are_no_answer(tmp_path: Path) -> None:
    backend = foreign.byte_level()
    backend.add_special_tokens(["</s>"])
    folder = foreign.save(backend, tmp_path / "two")
    message = r"names no end-of-text token; choose one with data\.eos_token, such as '<\|endoftext"
    with pytest.raises(UserError, match=message):
        Tokenizer.load(folder)
    assert Tokenizer.load(folder, eos_token="</s>").eos_token == "</s>"


@pytest.mark.parametrize("ends", [{"eos_token_id": 5}, {"eos_token_id": [5, 0]}], ids=str)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_models_config_says_which_token_ends_a_text(
    name: str, ends: dict[str, object], tmp_path: Path
) -> None:
    backend = foreign.byte_level()
    backend.add_special_tokens(["</s>"])  # two well-known ends
    folder = foreign.save(backend, tmp_path / "model")
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(json.dumps(ends))
    loaded = Tokenizer.load(folder)
    assert (loaded.eos_token, loaded.eos_id) == (backend.id_to_token(5), 5)


def test_a_model_that_names_no_end_of_text_is_mended_as_the_message_says(tmp_path: Path) -> None:
    backend = foreign.byte_level()
    backend.add_special_tokens(["</s>"])
    folder = foreign.save(backend, tmp_path / "model", {})
    (folder / "config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(UserError, match=r"tokenizer_config.json an eos_token, such as '<\|endof"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.load(folder).eos_token == "</s>"


def test_the_end_of_text_that_is_asked_for_goes_into_the_models_files(tmp_path: Path) -> None:
    folder = foreign.save(foreign.wordpiece(), tmp_path / "bert", {"eos_token": "[SEP]"})
    loaded = Tokenizer.load(folder, eos_token="cat")
    assert loaded.eos_id == Tokenizer.load(folder).encode("cat")[0]
    loaded.save(tmp_path / "model")
    again = Tokenizer.load(tmp_path / "model")
    assert (again.eos_token, again.eos_id, again.sha256) == ("cat", loaded.eos_id, loaded.sha256)


def test_an_end_of_text_outside_the_vocabulary_names_the_nearest(tmp_path: Path) -> None:
    folder = foreign.save(foreign.wordpiece(), tmp_path / "bert", {"eos_token": "[SEP]"})
    with pytest.raises(UserError, match=r"data\.eos_token='\[EOP\]' .* did you mean '\[SEP\]'"):
        Tokenizer.load(folder, eos_token="[EOP]")


@pytest.mark.parametrize(("kind", "piece"), [("word_level", "bird-watcher"), ("unigram", "\ud55c")])
def test_text_that_a_tokenizer_without_an_unknown_token_cannot_read_is_named(
    kind: str, piece: str
) -> None:
    made = foreign.word_level() if kind == "word_level" else foreign.unigram(None)
    tokenizer = foreign.as_tokenizer(made)
    assert not tokenizer.cuts_at_boundaries()
    with pytest.raises(UnreadableText, match="has no unknown token .*data.tokenizer=bpe") as caught:
        tokenizer.encode_batch(["the cat", f"a dog {piece} sees"])
    assert caught.value.piece == piece


def test_added_tokens_beyond_the_vocabulary_count(tmp_path: Path) -> None:
    backend = foreign.byte_level()
    size = backend.get_vocab_size()
    backend.add_tokens([AddedToken("<|user|>"), AddedToken("<|bot|>")])
    folder = foreign.save(backend, tmp_path / "chat", {"eos_token": "<|endoftext|>"})
    assert Tokenizer.load(folder).vocab_size == size + 2


def test_a_class_that_transformers_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(UserError, match=r"^data\.tokenizer=[^\n]+$"):
        Tokenizer.load(tmp_path)
