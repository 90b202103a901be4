"""What llama.cpp makes of exported models: the same tokens, numbers and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptray import LLM
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.entry_points import run
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained, save_pretrained
from tests.data import foreign
from tests.generation.models import random_gpt
from tests.jobs.llama import Llama
from tests.model.foreign_models import make_hf
from tests.tiny import tiny_text

KOREAN = "\uc61b\ub0a0 \uc61b\uc801\uc5d0 \ud55c \uc544\uc774\uac00 \uc0b4\uc558\ub2e4.\n"
CUT_UP = "(the cat 12345, 123456 1234567)\n\n(IT'S it's)\r\n\r\n  [don't]\n"
BY_HEART = tiny_text(3) + KOREAN
TEXTS = [
    *tiny_text(4).splitlines(),
    KOREAN,
    "It's 10  o'clock,\n\n  isn't it?\t12345 caf\u00e9s",
    "<|endoftext|>",
    CUT_UP,
    "\U0001f600\u4e00\u3002 x",
]


def saved(folder: Path, tokenizer: Tokenizer, model: GPT) -> Path:
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


def exported(model: Path, precision: str, folder: Path) -> Path:
    output = folder / f"{precision}.gguf"
    words = [f"export.model={model}", f"export.output_path={output}"]
    assert run("export", [*words, f"export.precision={precision}"]) == 0
    return output


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([tiny_text(100), KOREAN * 20], 400)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model that knows a text in English and Korean by heart, so that no two tokens tie."""
    model = random_gpt(tokenizer, initializer_range=0.05, n_embd=64, n_inner=96).train()
    tokens = torch.tensor(tokenizer.encode(BY_HEART * 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(len(tokens) - 33, (16, 1), generator=generator)
        batch = tokens[starts + torch.arange(33)]
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(tmp_path_factory.mktemp("trained") / "m", tokenizer, model.eval())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "q8_0"])
def test_the_next_token_has_the_same_probabilities(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path, precision: str
) -> None:
    llama = Llama(exported(trained, precision, tmp_path), context=64)
    model = load_pretrained(trained).eval()
    # llama.cpp rounds activations as it does weights, and takes GELU from a table in fp16.
    most = {"fp32": 0.01, "fp16": 0.01, "bf16": 0.1, "q8_0": 0.1}[precision]
    for text in TEXTS[:5]:
        ids = tokenizer.encode(text)
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        found = llama.log_probs(ids, 10)
        assert len(found) == 10
        for token, log_prob in found.items():
            assert abs(log_prob - float(expected[token])) < most


def test_greedy_texts_are_the_same(trained: Path, tmp_path: Path) -> None:
    llama = Llama(exported(trained, "fp32", tmp_path), context=64)
    prompts = [" ".join(BY_HEART.split()[n : n + 3]) for n in range(20)]
    outputs = LLM(str(trained)).generate(prompts, temperature=0, max_new_tokens=24, utf8=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert llama.greedy(llama.encode(prompt), 24) == (list(output.tokens), output.text)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ("llama", "llama with biases", "llama of release 3")),
        *((name, {}) for name in ("llama, YaRN", "qwen2", "qwen3", "smollm3")),
        ("exaone4 without windows", {}),
        ("olmo2", {}),
        *((name, {}) for name in ("gemma", "stablelm", "stablelm, tied")),
        ("granite", {}),
        ("granite with biases", {}),
        ("ernie4_5", {}),
        ("gemma3_text, six layers", {}),
        ("phi3", {"sliding_window": None}),
        ("phi3, LongRoPE", {"original_max_position_embeddings": 256}),  # its shortest context
    ],
)
def test_other_families_have_the_same_probabilities(
    tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz .\uc61b\ub0a0")
    theirs = make_hf(name, tokenizer.vocab_size, eos_id=tokenizer.eos_id, **changes)
    theirs.save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    llama = Llama(exported(tmp_path / "m", "fp32", tmp_path), context=96)
    ids = tokenizer.encode("the cat sees a dog. \uc61b\ub0a0")
    with torch.no_grad():
        expected = load_pretrained(tmp_path / "m").eval()(torch.tensor([ids]))[0, -1]
    found = llama.log_probs(ids, 10)
    assert len(found) == 10
    most = 0.01 if name.startswith("gemma") else 1e-3  # it takes GELU from a table in fp16
    for token, log_prob in found.items():
        assert abs(log_prob - float(expected.log_softmax(-1)[token])) < most


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: train_bpe([tiny_text(100), KOREAN * 20], 400),
    "bytes": lambda: train_bpe(["aa"], 257),
    "composed": lambda: foreign.as_tokenizer(foreign.byte_level(composed=True)),
    "digits": lambda: cut_by(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "qwen2": lambda: cut_by(split(rf"{LETTERS}|\p{{N}}{REST}")),
    "llama3": lambda: cut_by(split(rf"{LETTERS}|\p{{N}}{{1,3}}{REST}"), ignore_merges=True),
    "llama": lambda: foreign.as_tokenizer(foreign.llama()),
    "gemma": lambda: foreign.as_tokenizer(foreign.gemma()),
    "unigram": lambda: foreign.as_tokenizer(foreign.unigram("<unk>")),
    "char": lambda: char_tokenizer("".join(TEXTS)),
}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def cut_by(
    cut: pre_tokenizers.PreTokenizer, *, use_regex: bool = False, ignore_merges: bool = False
) -> Tokenizer:
    """Byte-level BPE that cuts text into other words, and has learnt them as tokens."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CUT_UP] * 9, trainer)
    return foreign.as_tokenizer(backend)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_have_the_same_tokens(tmp_path: Path, kind: str) -> None:
    made = TOKENIZERS[kind]()
    model = random_gpt(made, n_layer=1, n_head=1, n_embd=8, n_positions=256)
    llama = Llama(exported(saved(tmp_path / "m", made, model), "fp16", tmp_path), context=256)
    for text in TEXTS:
        ids = made.encode(text)
        assert llama.encode(text) == ids
        # Of a continuation llama.cpp keeps the space that begins a text.
        assert llama.decode(ids).removeprefix(" ") == made.decode(ids)
