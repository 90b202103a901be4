"""What runs without Linux's extras, as on macOS, and what Windows is told."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from gptray import system
from gptray.config import ComputeConfig, UserError
from gptray.generation.products import product
from gptray.jobs.cluster.machine import check_resources
from gptray.jobs.serve.proxy import middlewares
from gptray.jobs.train.worker import peak_memory
from gptray.model.gpu_faults import check_gpu
from gptray.model.precision import has_onednn_linear, pick_dtype
from gptray.native.backend import why_not_native
from gptray.native.compiler import why_no_library, why_not_compile
from tests.tiny import tiny_text

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240
# Python runs it at every start: no functions and no files of Linux's own, for our code; libraries
# may use them, since on macOS they have their own ways.
WITHOUT_LINUX = f"""
import os, signal, sys, time

for module, names in (
    (os, "sched_getaffinity sched_setaffinity waitid posix_fadvise posix_fallocate pidfd_open"),
    (signal, "sigtimedwait sigwaitinfo"),
    (time, "CLOCK_BOOTTIME"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)


def hide(event, arguments):
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    if not str(arguments[0]).startswith(("/proc", "/sys", "/dev/shm")):
        return
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith((os.path.dirname(os.__file__), "<frozen")):
        if "site-packages" in frame.f_code.co_filename:
            return
        frame = frame.f_back
    if frame and frame.f_code.co_filename.startswith({str(ROOT / "gptray")!r}):
        raise FileNotFoundError(2, "macOS has no such file", str(arguments[0]))


sys.addaudithook(hide)
"""
TINY = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.n_positions=32",
    "train.block_size=32",
    "train.global_batch_size=8",
    "train.max_steps=4",
    "train.eval_interval=2",
]
# The training loop without Ray, on a text and into a folder that are named.
LOOP = f"""
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append({str(ROOT / "benchmarks")!r})

from gptray.data.tokenizer import char_tokenizer
from made_tokens import split_tokens
from tests.tiny import tiny_config
from tests.training.runs import run

text, folder = map(Path, sys.argv[1:])
given = text.read_text()
data = split_tokens(folder / "data", char_tokenizer(given), train=given, val=given[:2000])
print(run(tiny_config(text, folder), data, folder / "run")["stopped"])
"""
# A job whose Ray's processes the system would not end with it.
UNSHARED = """
import sys, time
import psutil
import ray._private.utils
from gptray.jobs.cluster.own_ray import own_ray
ray._private.utils.detect_fate_sharing_support = lambda: None
with own_ray({}, num_cpus=1, log_to_driver=False):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a process without Linux's extras."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LINUX)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}


def ran(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text())
    return path


@pytest.mark.slow
def test_a_loop_trains_and_its_model_generates_without_linuxs_extras(
    bare: dict[str, str], text: Path, tmp_path: Path
) -> None:
    assert ran(bare, "-c", LOOP, str(text), str(tmp_path)).stdout == "max_steps\n"
    model = f"generate.model={tmp_path / 'run' / 'model'}"
    prompt = ["sample.prompt=a", "sample.max_new_tokens=4", "generate.backend=torch"]
    assert ran(bare, "-m", "gptray", "generate", model, *prompt).stdout


@pytest.mark.ray
def test_a_job_trains_without_linuxs_extras(
    bare: dict[str, str], text: Path, tmp_path: Path
) -> None:
    storage = f"storage_path={tmp_path / 'runs'}"
    train = ["-m", "gptray", "train", f"data.source={text}", "name=book", storage, *TINY]
    plan = json.loads(ran(bare, *train, "--dry-run").stdout.splitlines()[-1])
    assert plan["dry_run"] and not (tmp_path / "runs").exists()
    assert json.loads(ran(bare, *train).stdout.splitlines()[-1])["step"] == 4


def test_windows_is_told_in_one_sentence_where_gptray_runs() -> None:
    for start in ("import gptray", "from gptray.entry_points import run; run('train')"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.platform = 'win32'; {start}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        told = "gptray runs on Linux and macOS; on Windows, run it in WSL\n"
        assert (done.returncode, done.stderr) == (2, told)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this be macOS."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.ray
def test_rays_processes_end_with_a_killed_job_where_the_system_does_not_end_them() -> None:
    command = [sys.executable, "-c", UNSHARED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as job:
        assert job.stdout
        group = os.getpgid(job.pid)
        started = [psutil.Process(int(pid)) for pid in job.stdout.readline().split()]
        assert {"raylet", "gcs_server"} <= {process.name() for process in started}
        assert os.getpgid(job.pid) == group  # a terminal's Ctrl-C still reaches it
        job.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=LIMIT_S)
    assert alive == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for GPUs")
def test_a_macs_gpu_is_refused_with_what_to_do(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = "^compute.use_gpu=true, but gptray does not use Apple's GPUs; leave it out to use the"
    with pytest.raises(UserError, match=told):
        check_resources(ComputeConfig(use_gpu=True))
    with pytest.raises(UserError, match=told):
        check_gpu()


def test_a_macs_command_that_only_asks_to_install_a_compiler_is_none(
    mac: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "g++"
    stub.write_text("#!/bin/sh\necho 'no developer tools were found' >&2; exit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("CXX", str(stub))
    missing = f"there is no C++ compiler {stub} on this machine (xcode-select --install)"
    assert why_no_library() == missing
    assert missing in (why_not_compile(on_gpu=False) or "")


def test_a_limit_that_is_said_to_be_none_is_raised_to_what_macos_grants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    middlewares()
    assert asked == [(10_240, resource.RLIM_INFINITY)]


def test_peak_memory_is_in_bytes(mac: None) -> None:
    said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert said <= peak_memory(torch.device("cpu")) < 1024 * said


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch as its builds for macOS are; what it has is cached in the process."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        patch.setattr(torch.ops.onednn, "qlinear_prepack", None)
        has_onednn_linear.cache_clear()
        yield
    has_onednn_linear.cache_clear()


def test_int8_computes_where_pytorch_lacks_onednn(request: pytest.FixtureRequest) -> None:
    weight, bias = torch.randn(64, 32), torch.randn(64)
    x = torch.randn(4, 32)
    with_it = product(weight, bias, torch.float32, quantized="int8")(x)
    request.getfixturevalue("no_onednn")
    without = product(weight, bias, torch.float32, quantized="int8")(x)
    torch.testing.assert_close(without, with_it, atol=0.1, rtol=0.1)
    torch.testing.assert_close(without, x @ weight.t() + bias, atol=0.2, rtol=0.1)


def test_bf16_is_chosen_only_where_something_computes_it_fast(
    monkeypatch: pytest.MonkeyPatch, no_onednn: None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    assert (pick_dtype("auto", "cpu") is torch.bfloat16) == (why_not_native(use_gpu=False) is None)
    monkeypatch.setenv("CXX", "nowhere-g++")
    assert pick_dtype("auto", "cpu") is torch.float32


def test_cores_are_counted_without_affinities(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.usable_cores() == os.cpu_count()
