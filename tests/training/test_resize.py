"""Training on with another tokenizer: rows go with their tokens, and a resumed run agrees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptray.config import Config, override
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.model.parameters import WTE
from gptray.storage.record import EVENTS, read_rows
from gptray.training.building import build_model
from gptray.training.loop import fit
from tests.data import foreign
from tests.data.prepared import prepared_here
from tests.tiny import tiny_config, tiny_text

CPU = torch.device("cpu")
TEXT = tiny_text(600)


@pytest.fixture
def own() -> Tokenizer:
    return foreign.as_tokenizer(foreign.byte_level())


@pytest.fixture
def config(tmp_path: Path, own: Tokenizer) -> Config:
    made = tiny_config(tmp_path, tmp_path, "train.max_steps=4", "train.eval_interval=2")
    model = GPT(made.model, vocab_size=own.vocab_size)
    model.initialise(3)
    save_pretrained(model, tmp_path / "old")
    own.save(tmp_path / "old")
    return override(made, {"model.init_from": str(tmp_path / "old"), "model.resize_vocab": True})


def data_of(folder: Path, tokenizer: Tokenizer) -> TokenData:
    cut = 9 * len(TEXT) // 10
    return prepared_here(folder, tokenizer, train=TEXT[:cut], val=TEXT[cut:])


def with_added() -> Tokenizer:
    backend = foreign.byte_level()
    backend.add_special_tokens(["<|user|>", "<|bot|>"])
    return foreign.as_tokenizer(backend)


def embedding(model: GPT) -> torch.Tensor:
    return model.get_parameter("transformer.wte.weight").detach()


def test_rows_stay_with_their_tokens_and_new_ones_begin_near_the_mean(
    tmp_path: Path, config: Config, own: Tokenizer
) -> None:
    data = data_of(tmp_path / "data", with_added())
    told: list[str] = []
    model = build_model(config, data, None, CPU, tell=told.append)
    old = load_file(tmp_path / "old" / "model.safetensors")[WTE]
    rows = embedding(model)
    assert rows.shape == (own.vocab_size + 2, old.shape[1])
    assert torch.equal(rows[: own.vocab_size], old)
    new = rows[own.vocab_size :]
    assert not torch.equal(new[0], new[1])
    assert (new - old.mean(0)).abs().max() < 0.5 * old.std()
    assert told == [
        f"resized the embedding to the tokenizer's {own.vocab_size + 2} tokens: "
        f"{own.vocab_size} rows are from {tmp_path / 'old'}, 0 of them from another id; 2 new ones "
        "start from the mean row"
    ]
    other = override(config, {"seed": 7})
    assert not torch.equal(embedding(build_model(other, data, None, CPU, tell=print)), rows)


def test_a_head_of_its_own_is_resized_as_the_embedding_is(
    tmp_path: Path, config: Config, own: Tokenizer
) -> None:
    config = override(config, {"model.tie_word_embeddings": False, "model.norm": "rmsnorm"})
    old = GPT(config.model, vocab_size=own.vocab_size)
    save_pretrained(old, tmp_path / "old")
    data = data_of(tmp_path / "data", with_added())
    model = build_model(config, data, None, CPU, tell=lambda _: None)
    assert model.head.shape == (own.vocab_size + 2, config.model.n_embd)
    assert torch.equal(model.head[: own.vocab_size], old.head)
    assert not torch.equal(model.head, embedding(model))


def test_a_new_token_gets_about_the_probability_of_an_average_one(
    tmp_path: Path, config: Config, own: Tokenizer
) -> None:
    data = data_of(tmp_path / "data", with_added())
    model = build_model(config, data, None, CPU, tell=lambda _: None).eval()
    with torch.no_grad():
        shares = model(torch.tensor([own.encode("the cat sees")]))[0, -1].softmax(-1)
    assert shares[own.vocab_size :].max() < 3 / own.vocab_size


def test_rows_of_another_tokenizer_are_found_by_their_text(
    tmp_path: Path, config: Config, own: Tokenizer
) -> None:
    llama = foreign.as_tokenizer(foreign.llama())
    model = build_model(config, data_of(tmp_path / "data", llama), None, CPU, tell=lambda _: None)
    old = load_file(tmp_path / "old" / "model.safetensors")[WTE]
    [mine], theirs = own.encode(" cat"), llama.encode("the cat")[-1]
    assert torch.equal(embedding(model)[theirs], old[mine])
    assert torch.equal(embedding(model)[llama.eos_id], old[own.eos_id])


class Killed(BaseException):
    """Ends a run where a kill would."""


def run(config: Config, data: TokenData, folder: Path, *, kill_at: int | None = None) -> None:
    def report(metrics: dict[str, Any], checkpoint_dir: Path | None) -> None:
        if metrics["step"] == kill_at:
            raise Killed

    fit(config, data, folder, report=report, sample=lambda _: [], device=CPU)


def test_a_resized_run_resumes_to_the_same_bits_and_opens_in_transformers(
    tmp_path: Path, config: Config
) -> None:
    data = data_of(tmp_path / "data", with_added())
    run(config, data, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, data, tmp_path / "cut", kill_at=2)
    run(config, data, tmp_path / "cut")
    digests = [
        hashlib.sha256((tmp_path / name / "model" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "cut")
    ]
    assert digests[0] == digests[1]
    notices = [e for e in read_rows(tmp_path / "cut" / EVENTS) if e["event"] == "notice"]
    assert len(notices) == 1 and "2 new ones start from the mean row" in notices[0]["message"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut" / "model", trust_remote_code=False
    )
    assert model.config.vocab_size == len(
        AutoTokenizer.from_pretrained(tmp_path / "cut" / "model", trust_remote_code=False)
    )
    tied = model.get_parameter("transformer.wte.weight"), model.get_parameter("lm_head.weight")
    assert torch.equal(*tied)
