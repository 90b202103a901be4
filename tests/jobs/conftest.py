"""What tests of jobs share: a tiny model's folder, and an end for a test that hangs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptray.model.hf import save_pretrained
from tests.damage import deadline
from tests.generation.models import random_gpt, small_tokenizer
from tests.jobs.tracker import installed
from tests.object_store import ObjectStore, object_store
from tests.tiny import tiny_text


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def in_time() -> Iterator[None]:
    with deadline():
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store, with a cache of its own for what is fetched from there."""
    with object_store(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A short text."""
    path = tmp_path / "tiny.txt"
    path.write_text(tiny_text(300))
    return path


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed, so that a holder is seen to run, each 1.5 s rather than each 7.5."""
    monkeypatch.setattr("gptray.storage.lease.EXPIRES_S", 6.0)


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stand-in for the tracker W&B writes its calls to."""
    return installed(tmp_path, monkeypatch)
