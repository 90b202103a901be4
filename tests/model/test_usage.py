"""How a model is used goes with its weights: ends of text, settings, chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptray.config import UserError
from gptray.model.hf import load_pretrained, save_pretrained
from gptray.model.usage import Usage
from tests.generation.models import random_gpt, small_tokenizer

SETTINGS = {"temperature": 0.6, "bos_token_id": 7, "eos_token_id": [5, 9]}


def read(folder: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / name).read_text())
    return found


def test_it_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_pretrained(random_gpt(small_tokenizer()), first, eos_token_id=5)
    assert read(first, "generation_config.json") == {"bos_token_id": 5, "eos_token_id": 5}
    assert not (first / "chat_template.jinja").exists()
    (first / "generation_config.json").write_text(json.dumps(SETTINGS))
    (first / "chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
    save_pretrained(load_pretrained(first), second, eos_token_id=3)
    assert read(second, "generation_config.json") == {**SETTINGS, "eos_token_id": [5, 9, 3]}
    config = read(second, "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, [5, 9, 3])
    assert (second / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    save_pretrained(load_pretrained(first), second, eos_token_id=5, bos_token_id=2)
    assert read(second, "generation_config.json") == {**SETTINGS, "bos_token_id": 2}
    save_pretrained(load_pretrained(first), second, eos_token_id=[3, 9, 4])
    assert read(second, "generation_config.json") == {**SETTINGS, "eos_token_id": [5, 9, 3, 4]}


def test_a_template_is_found_in_the_tokenizers_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = tmp_path / "tokenizer_config.json"
    assert Usage.of(tmp_path) == Usage()
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert Usage.of(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert Usage.of(tmp_path).chat_template == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert Usage.of(tmp_path).chat_template == "four"


@pytest.mark.parametrize("ids", ["5", [5, None], -1, True, {"a": 1}, 2.5])
def test_ends_that_are_no_token_ids_are_refused_by_file(tmp_path: Path, ids: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id=.* is neither a token id"
    ):
        Usage.of(tmp_path)
