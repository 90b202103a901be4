"""The backend of a run: the faster one at its first start, and the same ever after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptray.config import Config, load_config, override
from gptray.data.tokens import TokenData
from gptray.jobs.folders.run_folder import resolve
from gptray.native.abi import load_library
from gptray.storage.record import Event, read_events
from gptray.training.block_timing import faster_kernels
from gptray.training.kernel_choice import agree_on_backend
from gptray.training.workers import Workers
from tests.generation.models import needs_native
from tests.model.foreign_models import make_hf
from tests.native.cache import another_model, become, own_cache, remember
from tests.tiny import tiny_config
from tests.training.runs import CPU, Killed, run
from tests.two_workers import two_workers

pytestmark = needs_native
ALONE = Workers(0, 1)


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> Config:
    words = ("train.precision=bf16", "train.max_steps=4", "train.eval_interval=2")
    return tiny_config(text_file, tmp_path, *words, "model.dropout=0.1")


@pytest.fixture
def measured(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the measurement for the config's network is."""
    folder = own_cache(tmp_path / "cache", monkeypatch)
    faster_kernels(config)
    return folder


def starts(run_dir: Path) -> list[Event]:
    return [event for event in read_events(run_dir) if event["event"] == "start"]


def notices(run_dir: Path) -> list[str]:
    return [event["message"] for event in read_events(run_dir) if event["event"] == "notice"]


def test_a_measurement_disturbs_no_random_numbers_and_happens_where_there_is_a_choice(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_cache(tmp_path / "cache", monkeypatch)
    torch.manual_seed(5)
    expected = torch.rand(3)
    for words in ({"train.backend": "native"}, {"train.backend": "torch"},
                  {"train.precision": "fp32"}):  # fmt: skip
        agree_on_backend(override(config, words), tmp_path, Workers(0, 1), CPU, print)
    assert not list(folder.glob("*.json"))
    torch.manual_seed(5)
    agree_on_backend(config, tmp_path, Workers(0, 1), CPU, print)
    assert len(list(folder.glob("*.json"))) == 1
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("quantized", ["none", "int8"])
def test_a_block_is_timed_as_it_is_trained(
    quantized: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf("gpt2", 41).save_pretrained(tmp_path / "base")
    words = [f"model.init_from={tmp_path / 'base'}", "lora.rank=2", f"quantize.weights={quantized}"]
    adapted = resolve(load_config(None, [*words, "train.precision=bf16", "train.block_size=16"]))
    folder = own_cache(tmp_path / "cache", monkeypatch)
    assert "failed in a trial" not in faster_kernels(adapted).why
    (record,) = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert (record["work"]["rank"], record["work"]["quantized"]) == (2, quantized)


@pytest.mark.parametrize(("first", "seconds"), [("torch", (2.0, 1.0)), ("native", (1.0, 2.0))])
def test_a_resumed_run_keeps_the_backend_that_it_began_with(
    config: Config,
    tiny_data: TokenData,
    tmp_path: Path,
    measured: Path,
    first: str,
    seconds: tuple[float, float],
) -> None:
    remember(measured, native=seconds[0], torch=seconds[1])
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "run", kill_at=2)
    remember(measured, native=seconds[1], torch=seconds[0])
    assert run(config, tiny_data, tmp_path / "run")["stopped"] == "max_steps"
    began, resumed = starts(tmp_path / "run")
    assert began["backend"] == resumed["backend"] == first
    assert "2.00x as fast as" in began["chosen"]
    assert "as when this run last started" in resumed["chosen"]
    assert notices(tmp_path / "run") == []


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_another_processor_is_told_of_and_changes_no_backend(
    config: Config,
    tiny_data: TokenData,
    tmp_path: Path,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    fast, slow = (1.0, 2.0) if backend == "native" else (2.0, 1.0)
    remember(measured, native=fast, torch=slow)
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "run", kill_at=2)
    become(tmp_path / "cpuinfo", monkeypatch, another_model)
    run(config, tiny_data, tmp_path / "run")
    assert [event["backend"] for event in starts(tmp_path / "run")] == [backend, backend]
    (told,) = notices(tmp_path / "run")
    assert told.startswith("resuming on another processor, Another after ")


def without_bf16(cpuinfo: str) -> str:
    return cpuinfo.replace(" avx512_bf16", "")


def test_a_processor_without_the_instructions_goes_on_through_pytorch_and_says_so(
    config: Config,
    tiny_data: TokenData,
    tmp_path: Path,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remember(measured, native=1.0, torch=2.0)
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "run", kill_at=2)
    become(tmp_path / "cpuinfo", monkeypatch, without_bf16)
    assert run(config, tiny_data, tmp_path / "run")["stopped"] == "max_steps"
    assert [event["backend"] for event in starts(tmp_path / "run")] == ["native", "torch"]
    (told,) = notices(tmp_path / "run")
    assert "PyTorch, because this processor has no avx512_bf16: the run began with" in told


def test_a_run_says_that_it_builds_the_kernels_and_goes_on_where_that_fails(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree_on_backend(override(config, {"train.backend": "native"}), tmp_path, ALONE, CPU, print)
    assert not read_events(tmp_path)  # they are there already
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "true")  # knows all options, and writes nothing
    load_library.cache_clear()
    told: list[str] = []
    assert agree_on_backend(config, tmp_path, ALONE, CPU, told.append).backend == "torch"
    load_library.cache_clear()
    (event,) = read_events(tmp_path)
    assert event["message"] == "building the C++ kernels, once for this processor"
    assert "wrote no library" in told[0]


def _worker(rank: int, config: Config, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            become(folder / "cpuinfo", patch, without_bf16)
        choice = agree_on_backend(config, folder / "run", Workers.current(), CPU, print)
    (folder / str(rank)).write_text(f"{choice.backend} {choice.why}")


@pytest.mark.slow
def test_a_run_that_no_longer_computes_in_bf16_says_so(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "run", kill_at=2)
    # What auto means on a processor without bf16.
    run(override(config, {"train.precision": "fp32"}), tiny_data, tmp_path / "run")
    assert [one for one in notices(tmp_path / "run") if "float32 here but in bfloat16" in one]


def test_all_workers_use_pytorch_where_one_cannot_run_the_kernels(
    config: Config, tmp_path: Path
) -> None:
    two_workers(_worker, config, tmp_path)
    first, other = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == "torch train.backend: PyTorch, because this processor has no avx512_bf16"
    assert other == first
