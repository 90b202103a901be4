"""Commands to type: a shell and the config read back what was meant."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gptray.config import load_config
from gptray.evaluation.model_commands import model_commands
from gptray.model.example import save_example


@pytest.mark.parametrize("place", ["", "model"])
@pytest.mark.parametrize(
    "prompt",
    [
        "the cat",
        "a\nb",
        "null",
        "Null",
        "~",
        "[x",
        "'it",
        '"so" he',
        'it\'s "\uc61b\ub0a0" & $5',
        " a ",
    ],
)
def test_a_prompt_arrives_as_it_is(tmp_path: Path, prompt: str, place: str) -> None:
    folder = tmp_path / "my 'model'"
    (folder / place).mkdir(parents=True)
    save_example(folder / place, prompt)
    commands = model_commands(folder)
    config = load_config(None, shlex.split(commands["generate"])[2:])
    assert (config.generate.model, config.sample.prompt) == (str(folder), prompt)
    assert load_config(None, shlex.split(commands["serve"])[2:]).serve.model == str(folder)


def test_a_chat_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    save_example(tmp_path, "<|im_start|>user\n", parse_special=True)
    config = load_config(None, shlex.split(model_commands(tmp_path)["generate"])[2:])
    assert (config.sample.prompt, config.sample.parse_special) == ("<|im_start|>user\n", True)


def test_a_plain_prompt_is_not_quoted(tmp_path: Path) -> None:
    save_example(tmp_path, "the cat")
    command = model_commands(tmp_path, "book")["generate"]
    assert command == "python jobs/generate.py generate.model=book 'sample.prompt=the cat'"
