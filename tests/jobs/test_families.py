"""What jobs say of models that are not GPT-2's, before they start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.entry_points import run
from gptray.jobs.evaluate.check import LONGEST_WINDOW
from gptray.jobs.evaluate.check import check as check_evaluate
from gptray.jobs.generate.checked import check_model
from gptray.jobs.generate.llm import LLM
from gptray.jobs.train.check import check, plan
from gptray.model.hf import save_pretrained
from tests.generation.models import needs_native, random_gpt, small_tokenizer
from tests.model.foreign_models import make_hf


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = small_tokenizer()
    theirs = make_hf("qwen3", tokenizer.vocab_size + 20, eos_id=tokenizer.eos_id)
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_a_dry_run_counts_the_parameters_and_names_the_family(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.init_from={qwen}", f"storage_path={tmp_path}", "train.block_size=32"]
    assert run("train", [*words, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    rows = small_tokenizer().vocab_size + 20
    block = 48 * (96 + 32 + 32) + 96 * 48 + 2 * 16 + 3 * 48 * 56 + 2 * 48
    assert planned["parameters"] == f"{rows * 48 + 2 * block + 48:,}"
    assert planned["saved as"] == "qwen3, which transformers can load"
    mix = plan(check(load_config(None, ["model.norm=rmsnorm", f"storage_path={tmp_path}"])))
    assert dict(mix)["saved as"].startswith("gptray, which only gptray can load")


@pytest.mark.parametrize("name", ["mistral without windows", "phi3 without LongRoPE"])
def test_a_network_that_llama_has_too_is_saved_as_the_family_it_came_from(
    tmp_path: Path, name: str
) -> None:
    tokenizer = small_tokenizer()
    make_hf(name, tokenizer.vocab_size).save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    words = [f"model.init_from={tmp_path / 'm'}", f"storage_path={tmp_path}"]
    made = plan(check(load_config(None, [*words, "train.block_size=32"])))
    assert dict(made)["saved as"] == f"{name.split()[0]}, which transformers can load"


@needs_native
def test_the_native_decoder_takes_every_family(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample.prompt=the cat", "--dry-run"]
    for job, key in (("serve", "serve.model"), ("generate", "generate.model")):
        for asked in ("native", "auto"):
            assert run(job, [f"{key}={qwen}", f"generate.backend={asked}", *words]) == 0
            planned = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
            assert planned["backend"].startswith(asked)
    assert LLM(qwen, backend="native").generate("the cat", max_new_tokens=2)


def test_a_long_context_is_not_scored_in_one_window(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, positions="rotary", n_positions=100_000)
    save_pretrained(model, tmp_path / "long")
    tokenizer.save(tmp_path / "long")
    (tmp_path / "text.txt").write_text("the cat sees a dog. " * 20)
    words = [f"evaluate.model={tmp_path / 'long'}", f"data.source={tmp_path / 'text.txt'}"]
    checked = check_evaluate(load_config(None, [*words, f"storage_path={tmp_path}"]))
    assert (checked.block_size, checked.stride) == (LONGEST_WINDOW, LONGEST_WINDOW)


def test_one_architecture_that_is_not_known_is_refused_with_those_that_are(
    qwen: Path, tmp_path: Path
) -> None:
    (tmp_path / "moe").mkdir()
    config = json.loads((qwen / "config.json").read_text()) | {"model_type": "qwen3_moe"}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    known = "gpt2, llama, mistral, qwen2, qwen3, gpt_neox, exaone4, olmo2, olmo3, smollm3, phi3, "
    known += "gemma3_text, gpt_neo, opt, gemma, stablelm, granite, ernie4_5"
    with pytest.raises(UserError, match=f"model_type 'qwen3_moe' is not one of {known}$"):
        check_model(load_config(None, [f"generate.model={tmp_path / 'moe'}"]))
