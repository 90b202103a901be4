"""A bulk job's backend: open until an engine's machine decides, then the same for all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptray.config import Config, UserError
from gptray.jobs.generate.checked import CheckedBatch, check_batch
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.output_plan import UNDECIDED
from gptray.model.hf import save_pretrained
from tests.generation.models import random_gpt, small_tokenizer
from tests.jobs.generating import config_of, planned


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), tmp_path / "model", eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return config_of(tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "out")


def backend_of(config: Config) -> str:
    with Output.opened(check_batch(config)) as output:
        return output.backend


def with_backend(config: Config, backend: str) -> Config:
    section = config.generate.model_copy(update={"backend": backend})
    return config.model_copy(update={"generate": section})


def test_what_was_decided_stays_for_the_job_that_resumes(config: Config) -> None:
    assert backend_of(config) == backend_of(config) == UNDECIDED
    with Output.opened(check_batch(config)) as output:
        output.decide("torch")
        metadata = output.metadata()
    assert json.loads(metadata["gptray.settings"])["generate.backend"] == "torch"
    assert backend_of(config) == backend_of(with_backend(config, "torch")) == "torch"
    with Output.opened(check_batch(config)) as output:
        assert output.metadata() == metadata
    with pytest.raises(UserError, match="generate.backend: 'torch' there, 'auto' now"):
        gpu = config.compute.model_copy(update={"use_gpu": True})
        Output.plan_there(check_batch_of(config.model_copy(update={"compute": gpu}), config))


def test_an_output_that_was_never_decided_is_refused_with_a_way_out(config: Config) -> None:
    with Output.opened(check_batch(config)) as output:
        output.decide("auto")  # as on GPUs, and as before there was a decision
    with pytest.raises(UserError, match="'auto' there, 'auto .CPU.' now\n.*is decided once"):
        Output.plan_there(check_batch(config))


def check_batch_of(config: Config, checked: Config) -> CheckedBatch:
    """The job of a config that this machine need not be able to run."""
    return replace(check_batch(checked), config=config)


def test_a_dry_run_says_where_the_backend_is_decided(config: Config) -> None:
    facts = dict(planned(config))
    assert facts["backend"] == (
        "auto: native or PyTorch, whichever is faster where the engines run"
    )
    assert dict(planned(with_backend(config, "torch")))["backend"] == "torch"
