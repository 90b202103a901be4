"""Which tokenizers a model can be trained on with, and which prompts; told without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptray.config import Config, ConfigError, ModelConfig, UserError, load_config, override
from gptray.data.tokenizer import Tokenizer, train_bpe
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.train.check import check
from gptray.jobs.train.given_models import check_vocabulary
from gptray.jobs.tune.check import check as check_sweep
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from tests.data import foreign
from tests.tiny import tiny_config, tiny_text

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=8, n_positions=32)


@pytest.fixture
def own(tmp_path: Path) -> Tokenizer:
    """The tokenizer of the model in `old`."""
    tokenizer = foreign.as_tokenizer(foreign.byte_level())
    save_pretrained(GPT(SHAPE, vocab_size=tokenizer.vocab_size), tmp_path / "old")
    tokenizer.save(tmp_path / "old")
    return tokenizer


def with_added(folder: Path, *names: str) -> Path:
    backend = foreign.byte_level()
    backend.add_special_tokens(list(names))
    return foreign.save(backend, folder, {"eos_token": "<|endoftext|>"})


def config(tmp_path: Path, *words: str) -> Config:
    (tmp_path / "text.txt").write_text(tiny_text(100))
    return resolve(
        load_config(
            None,
            [
                f"data.source={tmp_path / 'text.txt'}",
                f"storage_path={tmp_path}",
                f"model.init_from={tmp_path / 'old'}",
                "train.block_size=32",
                *words,
            ],
        )
    )


def test_the_models_own_tokenizer_fits(tmp_path: Path, own: Tokenizer) -> None:
    check_vocabulary(config(tmp_path))
    check_vocabulary(config(tmp_path, f"data.tokenizer={tmp_path / 'old' / 'tokenizer.json'}"))
    own.save(tmp_path / "copy")
    check_vocabulary(config(tmp_path, f"data.tokenizer={tmp_path / 'copy'}"))


def test_a_tokenizer_beyond_the_vocabulary_is_refused_before_the_text_is_prepared(
    tmp_path: Path, own: Tokenizer
) -> None:
    rows = own.vocab_size - 1
    fresh = override(
        config(tmp_path), {"data.tokenizer": str(tmp_path / "old"), "model.init_from": None}
    )
    with pytest.raises(
        UserError, match=rf"model\.vocab_size={rows} is smaller than the {rows + 1}"
    ):
        check(override(fresh, {"model.vocab_size": rows}))


def test_added_tokens_need_rows(tmp_path: Path, own: Tokenizer) -> None:
    added = with_added(tmp_path / "added", "<|user|>", "<|bot|>")
    message = (
        rf"has {own.vocab_size + 2} tokens, .* has only {own.vocab_size} rows; set model\.resize"
    )
    with pytest.raises(UserError, match=message):
        check(config(tmp_path, f"data.tokenizer={added}"))
    check(config(tmp_path, f"data.tokenizer={added}", "model.resize_vocab=true"))


def test_added_tokens_that_fit_into_padding_need_nothing(tmp_path: Path, own: Tokenizer) -> None:
    save_pretrained(GPT(SHAPE, vocab_size=own.vocab_size + 2), tmp_path / "old")
    added = with_added(tmp_path / "added", "<|user|>", "<|bot|>")
    check_vocabulary(config(tmp_path, f"data.tokenizer={added}"))


def test_tokens_added_in_the_models_own_folder_need_rows(tmp_path: Path, own: Tokenizer) -> None:
    added = with_added(tmp_path / "added", "<|user|>")
    (added / "tokenizer.json").rename(tmp_path / "old" / "tokenizer.json")
    with pytest.raises(UserError, match=r"rows; set model\.resize_vocab=true"):
        check_vocabulary(config(tmp_path))


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_new_tokenizer_is_refused(tmp_path: Path, own: Tokenizer, kind: str) -> None:
    message = rf"^data\.tokenizer={kind}: a new tokenizer's ids .*model\.resize_vocab=true"
    with pytest.raises(UserError, match=message):
        check(config(tmp_path, f"data.tokenizer={kind}"))
    check(config(tmp_path, f"data.tokenizer={kind}", "model.resize_vocab=true"))


def test_a_foreign_tokenizer_is_refused_with_the_number_of_other_ids(
    tmp_path: Path, own: Tokenizer
) -> None:
    train_bpe(["quite another text"], 290).save(tmp_path / "foreign")
    with pytest.raises(UserError, match=r"\d+ of its 2\d\d ids mean other tokens than in"):
        check_vocabulary(config(tmp_path, f"data.tokenizer={tmp_path / 'foreign'}"))


def test_every_trial_of_a_sweep_is_checked(tmp_path: Path, own: Tokenizer) -> None:
    space = json.dumps([{"path": "data.tokenizer", "choice": ["bpe", "char"]}])
    with pytest.raises(UserError, match=r"model\.resize_vocab=true"):
        check_sweep(config(tmp_path, "name=null", f"tune.space={space}"))


def test_without_a_tokenizer_nothing_tells_what_rows_mean(tmp_path: Path, own: Tokenizer) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "old" / name).unlink()
    with pytest.raises(UserError, match=r"model\.resize_vocab=true: .* has no tokenizer"):
        check_vocabulary(config(tmp_path, "data.tokenizer=bpe", "model.resize_vocab=true"))


def test_a_resized_vocabulary_is_the_tokenizers(tmp_path: Path, own: Tokenizer) -> None:
    resized = config(tmp_path, "model.resize_vocab=true")
    assert resized.model.vocab_size is None
    assert resolve(resized) == resized
    kept = config(tmp_path, "model.resize_vocab=true", "model.vocab_size=512")
    assert kept.model.vocab_size == 512


def test_resizing_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"model\.resize_vocab=true needs model\.init_from"):
        load_config(None, ["model.resize_vocab=true"])


def unreadable(tmp_path: Path, *words: str) -> Config:
    """A prompt that a tokenizer folder's alphabet lacks."""
    (tmp_path / "text.txt").write_text(tiny_text(100))
    foreign.as_tokenizer(foreign.word_level()).save(tmp_path / "words")
    return tiny_config(
        tmp_path / "text.txt",
        tmp_path,
        f"data.tokenizer={tmp_path / 'words'}",
        "sample.prompt=the zebra",
        *words,
    )


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused_at_once(tmp_path: Path) -> None:
    message = r"^sample\.prompt='the zebra': .* does not know 'zebra'"
    with pytest.raises(UserError, match=message):
        check(unreadable(tmp_path))
    space = json.dumps([{"path": "model.dropout", "choice": [0.0, 0.1]}])
    with pytest.raises(UserError, match=message):
        check_sweep(unreadable(tmp_path, f"tune.space={space}"))
    check(unreadable(tmp_path, "sample.prompt=the cat", 'sample.stop="zebra"'))


def test_the_end_of_texts_name_in_a_prompt_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    prompt = "sample.prompt=the cat</s>the dog"
    with pytest.raises(UserError, match=r"does not know '.*</s>.*'"):
        check(unreadable(tmp_path, prompt))
    check(unreadable(tmp_path, prompt, "sample.parse_special=true"))
