"""Chats through the jobs: prepared, trained on, scored, and a model that chats as it was taught."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gptray import LLM
from gptray.config import Config, UserError, load_config
from gptray.jobs.base import find_job
from gptray.jobs.evaluate.run import evaluate
from gptray.jobs.prepare.run import prepare
from gptray.jobs.train.check import check, plan
from gptray.jobs.train.run import train
from tests.data.chatting import CHATML, CHATS, chat_tokenizer, write_chats
from tests.model.foreign_models import make_hf

ASK = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama whose tokenizer has a chat template."""
    folder = chat_tokenizer(tmp_path / "base")
    size = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    with torch.no_grad():
        make_hf("llama", size, eos_id=size - 1).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [
        {"messages": [*chat, {"role": "user", "content": f"{number} of them"}]}
        for number in range(30)
        for chat in CHATS
    ]
    return write_chats(tmp_path / "chats.jsonl", rows)


def config_of(tmp_path: Path, base: Path, chats: Path, *words: str) -> Config:
    settings = [
        f"storage_path={tmp_path / 'runs'}", "name=run", f"model.init_from={base}",
        f"data.source={chats}", "train.block_size=32", "train.max_steps=4",
        "train.eval_interval=2", "train.precision=fp32", "sample.max_new_tokens=2",
        "compute.cpus_per_worker=1", "train.global_batch_size=4",
    ]  # fmt: skip
    return load_config(None, [*settings, *words])


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_chats_as_it_was_taught(
    tmp_path: Path, base: Path, chats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, base, chats, "data.split=80:10:10")
    with caplog.at_level(logging.INFO, "gptray"):
        checked = check(config)
    written = f"messages, as the chat template of {base} writes it"
    assert f"{chats} has no column 'text'; reading {written}" in caplog.messages
    assert dict(plan(checked))["text column"] == written
    result = train(config)
    data = prepare(config)
    assert data.manifest["chats"] == data.manifest["documents"] == 90
    markers = [one for one in data.manifest["warnings"] if "markers" in one]
    assert not markers, "the template's tokens are none"
    assert len(data.manifest["tokenizer"]["chat_template"]) == 64
    theirs: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    ids = [theirs.apply_chat_template(row, return_dict=False) for row in rows]
    assert sum(split.tokens for split in data.splits.values()) == sum(map(len, ids))
    texts = [theirs.apply_chat_template(row, tokenize=False) for row in rows]
    assert data.manifest["bytes"] == sum(len(text.encode()) for text in texts)

    model = LLM(result["model_dir"])
    (answer,) = model.chat(ASK, max_new_tokens=2)
    assert answer.prompt == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    example = json.loads((Path(result["model_dir"]) / "gptray.json").read_text())
    text = theirs.decode(data.val.slice(0, min(len(data.val), 200)).tolist())
    asked = text.partition("<|im_start|>assistant\n")
    assert example == {"example_prompt": "".join(asked[:2]), "parse_special": True}
    held = write_chats(tmp_path / "held.json", [{"messages": CHATS[1]}] * 4)
    words = [f"storage_path={tmp_path / 'runs'}", "evaluate.model=run", "evaluate.passages=0"]
    scored = evaluate(load_config(None, [*words, f"evaluate.source={held}"]))
    assert scored["test_bpb"] > 0
    assert evaluate(load_config(None, words))["val_bpb"] == pytest.approx(result["val_bpb"], 1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_another_template_makes_other_data_and_goes_with_the_model(
    tmp_path: Path, base: Path, chats: Path
) -> None:
    first = prepare(config_of(tmp_path, base, chats))
    (base / "chat_template.jinja").write_text(CHATML.replace("assistant\n", "assistant "))
    second = prepare(config_of(tmp_path, base, chats))
    assert first.data_dir != second.data_dir and first.fingerprint == second.fingerprint
    second.verify()
    (base / "chat_template.jinja").write_text(CHATML.replace("+ '\n' }}", "}}"))
    third = prepare(config_of(tmp_path, base, chats))
    assert third.fingerprint != first.fingerprint


def test_chats_need_a_template(tmp_path: Path, model_dir: Path, chats: Path) -> None:
    again = write_chats(tmp_path / "more.jsonl", [{"messages": CHATS[0]}])
    for words in ([f"model.init_from={model_dir}"], ["data.tokenizer=bpe"]):
        settings = [
            f"storage_path={tmp_path}", f"data.source=[{chats}, {again}]", "train.block_size=32",
            *words,
        ]  # fmt: skip
        with pytest.raises(UserError, match=r"^[^\n]*chats.jsonl:1: [^\n]* no chat template .*$"):
            find_job("train").check(load_config(None, settings))


def test_a_tokenizer_that_is_nowhere_is_told_once(tmp_path: Path, chats: Path) -> None:
    settings = [f"storage_path={tmp_path}", f"data.source={chats}", "data.tokenizer=./none"]
    with pytest.raises(UserError, match=r"^data.tokenizer=./none: no such folder or file$"):
        find_job("train").check(load_config(None, settings))
