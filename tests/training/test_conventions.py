"""A run that begins from a model keeps how that is used: its tokens, ends and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gptray.config import ModelConfig, load_config
from gptray.data.tokenizer import Tokenizer
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.train.samples import sample_texts
from gptray.model.gpt import GPT
from gptray.training.evaluations import Samples
from gptray.training.publishing import save_model
from tests.data import foreign
from tests.data.chatting import CHATS, chat_tokenizer
from tests.data.prepared import chats_here, prepared_here
from tests.model.foreign_models import make_hf
from tests.tiny import tiny_text
from tests.training.runs import rows, run

TEMPLATE = "{{ bos_token }}{% for one in messages %}{{ one.content }}{% endfor %}"
ENDS = [2, 40, 41]


def test_what_a_model_brings_along_stays_with_it(tmp_path: Path) -> None:
    base, backend = tmp_path / "base", foreign.beginning(foreign.llama(), "<s> $A")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    foreign.save(backend, base, settings)
    theirs = make_hf("llama", backend.get_vocab_size(), eos_id=2, initializer_range=0.05)
    theirs.save_pretrained(base)
    generation = {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": ENDS}
    (base / "generation_config.json").write_text(json.dumps(generation))
    val = tiny_text(2, seed=1)
    tokenizer = Tokenizer.load(base)
    data = prepared_here(tmp_path / "data", tokenizer, train=tiny_text(300), val=val)
    words = [
        f"storage_path={tmp_path}", "name=run", f"model.init_from={base}", "train.max_steps=2",
        "train.eval_interval=1", "train.log_interval=1", "train.global_batch_size=4",
        "train.block_size=90", "train.precision=fp32", "sample.max_new_tokens=4",
        f"sample.prompt={'the cat ' * 40}",
    ]  # fmt: skip
    config = resolve(load_config(None, words))

    def sample(model: GPT) -> Samples:
        assert model.usage.eos_ids == (*ENDS,)
        return sample_texts(config, data, model)  # a prompt that is too long for the context

    run(config, data, tmp_path / "run", sample=sample)
    folders = [tmp_path / "run" / "checkpoint_000001" / "model", tmp_path / "run" / "model"]
    for folder in folders:
        assert json.loads((folder / "generation_config.json").read_text()) == generation
        own: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        asked = [{"role": "user", "content": "the cat"}]
        assert own.apply_chat_template(asked, tokenize=False) == "<s>the cat"
        assert own("the cat").input_ids == tokenizer.prompt_ids("the cat")
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ENDS
    # Its validation loss is transformers' of the same ids.
    last = rows(tmp_path / "run")[-1]["val_loss"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoint_000002" / "model", trust_remote_code=False
    )
    ids = torch.tensor([[*own(val).input_ids, 2]])
    with torch.no_grad():
        assert abs(float(model(ids, labels=ids).loss) - last) < 1e-4


def test_transformers_sees_that_a_turn_ends_the_text(tmp_path: Path) -> None:
    data = chats_here(tmp_path / "data", chat_tokenizer(tmp_path / "base", "based"), CHATS)
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=16)
    save_model(GPT(shape, vocab_size=data.vocab_size), tmp_path / "model", data)
    names: Any = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    ends = names.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == ends
    written = names.apply_chat_template(CHATS[0], return_dict=False)
    assert data.val.slice(0, len(written)).tolist() == written
