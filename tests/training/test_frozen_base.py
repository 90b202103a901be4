"""A frozen base in memory that the processes of a machine share."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptray.config import Config, dump
from gptray.data.tokens import TokenData
from gptray.model.adapter import Base
from gptray.model.adapter_files import adapted_network
from gptray.model.frozen_base import load_base
from gptray.model.gpt import GPT
from gptray.model.quantized import ROUNDING
from gptray.native.build import library_name
from gptray.storage.files import cache_folder, sha256_of
from gptray.storage.node_cache import make_room
from gptray.training.building import build_model
from gptray.training.loop import fit
from tests.full_disk import files_up_to
from tests.generation.models import needs_native
from tests.training.runs import CPU, rows, run
from tests.training.test_evaluations import digest
from tests.training.test_lora import config_in
from tests.two_workers import two_workers

# transformers'.
pytestmark = pytest.mark.filterwarnings("ignore")
LAST = "checkpoint_000006"
OUTCOME = ("adapter/adapter_model.safetensors", "model/model.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a node's cache of the test's own has frozen bases."""
    built = list(cache_folder().glob(f"{library_name()}-*.so"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_folder().mkdir(parents=True)
    for library in built:
        shutil.copy(library, cache_folder())
    return cache_folder() / "frozen"


def mapped() -> list[dict[str, int]]:
    """The mappings of a frozen base that this process has: their KiB in memory, by kind."""
    found, is_base = list[dict[str, int]](), False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            is_base = line.endswith("frozen.bin")
            found += [{}] * is_base
        elif is_base and line.endswith(" kB"):
            name, size, _ = line.split()
            found[-1] = found[-1] | {name.rstrip(":"): int(size)}
    return found


def is_in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are in a mapping of a frozen base."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        start, end = (int(one, 16) for one in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith("frozen.bin")
    raise AssertionError("a tensor outside of memory")


def network(config: Config, data: TokenData) -> GPT:
    return build_model(config, data, None, CPU, tell=pytest.fail)


@pytest.mark.parametrize("words", [
    ["quantize.weights=none"],
    ["quantize.weights=int4", "lora.train=[norms]"],
    ["train.precision=bf16", "quantize.weights=iq4_nl", "lora.train=[embeddings]"],
])  # fmt: skip
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_frozen_is_mapped_and_what_is_trained_is_not(
    family: str, words: list[str], tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, *words, family=family)
    model = network(config, tiny_data)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert is_in_file(tensor) is not tensor.requires_grad, name
    base = Base.of(str(tmp_path / "base"), quantized=config.quantize.weights)
    own = adapted_network(
        base, config.lora, config.model, vocab_size=tiny_data.vocab_size,
        dtype=model.compute_dtype, seed=config.seed, load=load_base,
    )  # fmt: skip
    theirs = own.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
    assert model.usage == own.usage and model.num_params == own.num_params


@pytest.mark.parametrize("words", [
    ["quantize.weights=none"],
    ["optim.schedule=wsd", "optim.decay_fraction=0.5"],
    pytest.param(
        ["train.precision=bf16", "train.backend=native", "quantize.weights=int8"],
        marks=needs_native,
    ),
])  # fmt: skip
def test_a_run_writes_to_no_page_that_it_shares(
    words: list[str], tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, *words)
    seen = list[dict[str, int]]()

    def look(model: GPT) -> list[tuple[str, str]]:
        seen.extend(mapped())
        return []

    run(config, tiny_data, tmp_path / "run", sample=look)
    assert len(seen) > 2 and all(one["Rss"] and not one["Private_Dirty"] for one in seen)


def test_bases_that_differ_have_files_of_their_own(
    tiny_data: TokenData, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(*words: str) -> int:
        network(config_in(tmp_path, tiny_data, *words), tiny_data)
        return len(list(cache.glob("*/frozen.bin")))

    assert files() == 1
    assert files("lora.rank=4", "lora.targets=[c_attn]", "lora.dropout=0", "optim.lr=1") == 1
    assert files("quantize.weights=int4") == 2
    assert files("quantize.weights=iq4_nl") == 3
    assert files("train.precision=bf16") == 4
    with monkeypatch.context() as changed:  # weights are rounded in another way from now on
        changed.setattr("gptray.model.frozen_base.ROUNDING", ROUNDING + 1)
        assert files("quantize.weights=int4") == 5
    shutil.rmtree(tmp_path / "base")
    assert files("seed=1") == 5  # the same model, written again
    weights = tmp_path / "base" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert files() == 6


def test_a_full_disk_is_told_once_and_changes_nothing(
    tiny_data: TokenData, tmp_path: Path, cache: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    told = list[str]()
    with files_up_to(1000):
        model = build_model(config, tiny_data, None, CPU, tell=told.append)
    (line,) = told
    expected = f"this process keeps its own copy of {tmp_path}/base: cannot write {cache}: "
    assert re.fullmatch(re.escape(expected) + r"File too large \([0-9,]+ bytes free\)", line), line
    assert not any(map(is_in_file, model.state_dict().values()))
    assert not list(cache.glob("*/"))
    theirs = network(config, tiny_data).state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in model.state_dict().items())


@pytest.mark.slow
def test_a_damaged_file_is_made_again(tiny_data: TokenData, tmp_path: Path, cache: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    other = train_elsewhere(config, tiny_data, tmp_path / "first")
    other.communicate(timeout=400)
    assert other.returncode == 0
    (file,) = cache.glob("*/frozen.bin")
    before = sha256_of(file)
    with file.open("r+b") as damaged:
        damaged.write(b"\xff" * 64)
    run(config, tiny_data, tmp_path / "second")
    assert sha256_of(file) == before
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def train_elsewhere(
    config: Config, data: TokenData, run_dir: Path, *, ends: bool = True
) -> subprocess.Popen[str]:
    """A process that trains; without `ends` it waits at step 2, and says so."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    config_file = run_dir.with_suffix(".yaml")
    config_file.write_text(dump(config), "utf-8")
    command = [sys.executable, "-c", _TRAIN, config_file, data.data_dir, run_dir, str(int(ends))]
    return subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


_TRAIN = """
import sys
from pathlib import Path
import torch
from gptray.config import load_config
from gptray.data.tokens import TokenData
from gptray.training.loop import fit

config, data_dir, run_dir, ends = sys.argv[1:]

def report(metrics, checkpoint):
    if metrics["step"] == 2 and ends == "0":
        print("at step 2", flush=True)
        sys.stdin.read()

torch.set_num_threads(1)
fit(load_config(config, []), TokenData.open(Path(data_dir)), Path(run_dir), report=report,
    sample=lambda model: [], device=torch.device("cpu"))
"""


@pytest.mark.slow
def test_a_killed_process_takes_nothing_from_the_others(
    tiny_data: TokenData, tmp_path: Path, cache: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    both = [train_elsewhere(config, tiny_data, tmp_path / name, ends=False) for name in "ab"]
    try:
        for one in both:
            assert one.stdout and one.stdout.readline() == "at step 2\n"
        (file,) = cache.glob("*/frozen.bin")
        inode = str(file.stat().st_ino)
        for one in both:
            lines = Path(f"/proc/{one.pid}/maps").read_text("utf-8").splitlines()
            assert [line.split()[4] for line in lines if "frozen.bin" in line] == [inode]
        both[0].send_signal(signal.SIGKILL)
        both[0].wait(timeout=60)
        make_room(most=0)
        assert file.exists()  # the other one uses it
        both[1].communicate("", timeout=400)
        assert both[1].returncode == 0
    finally:
        for one in both:
            one.kill()
            one.communicate()
    make_room(most=0)
    assert not file.exists()
    run(config, tiny_data, tmp_path / "a")
    run(config, tiny_data, tmp_path / "whole")
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "whole")


def digests(run_dir: Path) -> list[str]:
    names = *OUTCOME, f"{LAST}/adapter/adapter_model.safetensors", f"{LAST}/optimizer.safetensors"
    return [digest(run_dir / name) for name in names]


def _worker(rank: int, config: Config, data_dir: Path, folder: Path) -> None:
    seen = list[dict[str, int]]()

    def report(metrics: object, checkpoint: Path | None) -> None:
        seen.extend(mapped())

    data = TokenData.open(data_dir)
    fit(config, data, folder / "run", report=report, sample=lambda model: [], device=CPU)
    (folder / f"rank-{rank}").write_text(str([one["Private_Dirty"] for one in seen]), "utf-8")


@pytest.mark.slow
def test_workers_of_a_run_share_it(tiny_data: TokenData, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_data, "compute.num_workers=2")
    two_workers(_worker, config, tiny_data.data_dir, tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text("utf-8") == "[0, 0, 0]"
    assert rows(tmp_path / "run")[-1]["step"] == 6
