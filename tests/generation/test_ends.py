"""A text ends at every token that its model's folder names, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gptray.config import load_config
from gptray.generation.loading import open_engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from tests.data import foreign
from tests.model.foreign_models import make_hf

PROMPTS = ["the cat", "a dog sees", "", "my brother likes the"]
NEW = 12
EXACT = ["generate.backend=torch", "generate.precision=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer begins every text with <|begin|>."""
    made = tmp_path_factory.mktemp("llama") / "model"
    backend = foreign.beginning(foreign.byte_level(), "<|begin|> $A")
    foreign.save(backend, made, {"eos_token": "<|endoftext|>", "bos_token": "<|begin|>"})
    theirs = make_hf("llama", backend.get_vocab_size(), eos_id=0)
    theirs.save_pretrained(made)
    return made


def theirs(folder: Path, prompt: str, **settings: Any) -> list[int]:
    """transformers' greedy ids after a prompt, the end among them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(
        prompt, return_tensors="pt"
    )
    out = model.generate(**ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)
    return [int(number) for number in out[0, ids["input_ids"].size(1) :]]


def ours(folder: Path, **settings: Any) -> list[Sequence]:
    engine, tokenizer = open_engine(folder, load_config(None, EXACT))
    sampling = Sampling(**{"temperature": 0.0, "max_new_tokens": NEW, "utf8": False, **settings})
    return engine.run([Sequence(tokenizer.prompt_ids(one), sampling) for one in PROMPTS])


@torch.no_grad()
def test_greedy_ends_where_transformers_ends(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 0}))
    free = [theirs(folder, prompt) for prompt in PROMPTS]
    ends = [0, free[0][4], free[1][7], 60_000]
    path.write_text(json.dumps({"eos_token_id": ends}))
    stopped = 0
    for one, prompt in zip(ours(folder), PROMPTS, strict=True):
        expected = theirs(folder, prompt)
        assert one.finish_reason == ("stop" if expected[-1] in ends else "length")
        assert one.tokens + ([one.end.token] if one.end else []) == expected
        stopped += one.finish_reason == "stop"
    assert stopped >= 2
    for one in ours(folder, min_new_tokens=NEW):
        assert len(one.tokens) == NEW and not set(ends) & set(one.tokens)
    freely = ours(folder, ignore_eos=True)
    assert freely[0].tokens[:5] == free[0][:5] and len(freely[0].tokens) == NEW
    # Without generation_config.json, config.json says it.
    path.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends[1]}))
    first = ours(folder)[0]  # the tokenizer's own end, 0, counts as well
    assert first.finish_reason == "stop" and first.tokens == free[0][: free[0].index(ends[1])]


@torch.no_grad()
def test_stop_token_ids_end_where_transformers_ends_at_more_ends(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    free = [theirs(folder, prompt) for prompt in PROMPTS]
    stops = (free[0][4], free[1][7])
    rows = (
        ours(folder, stop_token_ids=stops),
        ours(folder, stop_token_ids=stops, include_stop_str_in_output=True),
    )
    for prompt, cut, kept in zip(PROMPTS, *rows, strict=True):
        expected = theirs(folder, prompt, eos_token_id=[0, *stops])
        assert cut.tokens + ([cut.end.token] if cut.end else []) == expected
        assert kept.tokens + ([kept.end.token] if kept.end else []) == expected
        stop = expected[-1] if expected[-1] in stops else None
        assert cut.stop_reason == kept.stop_reason == stop
        assert (kept.end is None) == (expected[-1] != 0)
    assert {row.stop_reason for row in rows[0]} >= {*stops}
