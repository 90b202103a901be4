"""Prompts on the terminal and in training's samples: what they start from, what they draw."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptray.config import RunFailed, UserError, load_config
from gptray.data.tokens import TokenData
from gptray.jobs.train.samples import sample_texts
from gptray.standard_output import Unread
from tests.generation.models import random_gpt
from tests.jobs.generating import generate
from tests.tiny import tiny_config


def written(model_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    keys = {"generate.model": str(model_dir), "generate.precision": "fp32"}
    keys |= {"sample.max_new_tokens": "12"} | dict(pair.split("=", 1) for pair in overrides)
    config = load_config(None, [f"{key}={value}" for key, value in keys.items()])
    outputs = generate(config)["outputs"]
    assert isinstance(outputs, list)
    return outputs


def test_equal_prompts_get_different_texts_that_can_be_made_again(model_dir: Path) -> None:
    several = written(model_dir, "sample.prompt=[the cat, the cat, the cat]", "sample.seed=4")
    assert len({one["output"] for one in several}) == 3
    for one in several:
        alone = written(model_dir, "sample.prompt=the cat", f"sample.seed={one['seed']}")
        assert alone == [one]


def test_a_prompt_has_as_many_outputs_as_asked_for_until_the_context_is_full(
    model_dir: Path,
) -> None:
    outputs = written(
        model_dir, "sample.prompt=[the cat, a dog]", "generate.num_samples=3",
        "sample.max_new_tokens=500", "sample.min_new_tokens=500",
    )  # fmt: skip
    assert [one["prompt"] for one in outputs] == ["the cat"] * 3 + ["a dog"] * 3
    assert len({one["output"] for one in outputs}) == 6
    assert {one["finish_reason"] for one in outputs} == {"length"}
    assert all(0 < one["output_tokens"] < 64 for one in outputs)


def test_an_empty_prompt_is_the_end_of_text_token_where_that_is_allowed(model_dir: Path) -> None:
    (empty,) = written(model_dir, 'sample.prompt=""')
    (named,) = written(model_dir, "sample.prompt=<|endoftext|>", "sample.parse_special=true")
    (plain,) = written(model_dir, "sample.prompt=<|endoftext|>")
    assert empty["output"] == named["output"] != plain["output"]


def test_samples_of_a_training_are_independent_draws(
    tiny_data: TokenData, text_file: Path, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path, "sample.prompt=[the, the, the]")
    model = random_gpt(tiny_data.tokenizer)
    outputs = [output for _, output in sample_texts(config, tiny_data, model)]
    assert len(set(outputs)) == 3


class Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether PyTorch had to be deterministic at sums of weights, which GPUs then refuse."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = set[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cumsum.default:
            self.seen.add(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


def test_samples_are_drawn_without_determinism_which_training_then_has_again(
    tiny_data: TokenData, text_file: Path, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path, "sample.prompt=the")
    torch.use_deterministic_algorithms(True)
    try:
        with Drawing() as drawing:
            sample_texts(config, tiny_data, random_gpt(tiny_data.tokenizer))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert drawing.seen == {False}


@pytest.mark.parametrize("is_full", [True, False])
def test_text_that_cannot_be_printed_ends_the_job(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    told = pytest.raises(
        RunFailed, match="^cannot write to standard output: No space left on device$"
    )
    with open("/dev/full" if is_full else write_end, "w", encoding="utf-8") as out:
        monkeypatch.setattr("sys.stdout", out)
        with told if is_full else pytest.raises(Unread):
            written(model_dir, "sample.prompt=the cat")


def test_what_a_model_writes_cannot_command_the_terminal(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    escape = "\x1b]0;title\x07the cat"
    (one,) = written(model_dir, f"sample.prompt={json.dumps(escape)}")
    shown = capsys.readouterr().out
    assert one["prompt"] == escape and shown.startswith(r"\x1b]0;title\x07the cat")
    assert "\x1b" not in shown


def test_a_folder_for_what_is_only_printed_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generate\.output_path=.*/out needs generate.input_path"):
        written(model_dir, "sample.prompt=the", f"generate.output_path={tmp_path}/out")


def test_a_prompt_that_is_too_long_is_not_told_whole(model_dir: Path) -> None:
    with pytest.raises(UserError, match="the prompt is too long: ") as refused:
        written(model_dir, f"sample.prompt={'the cat ' * 500}")
    assert "sample.prompt='the cat" in str(refused.value) and len(str(refused.value)) < 250
