"""A tiny model's folder, for the jobs that use one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.model.hf import save_pretrained
from tests.generation.models import random_gpt, small_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder
