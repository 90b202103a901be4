"""GPUs are seen without torch, and what is wrong with them is told in one sentence."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from gptray import gpus
from gptray.config import ComputeConfig, Config, RunFailed, UserError, override
from gptray.jobs.cluster.machine import check_resources, check_training
from gptray.model.gpu_faults import check_gpu, memory_told, out_of_gpu_memory, runs_on, why_failed
from gptray.model.precision import pick_dtype
from gptray.native.compiler import why_not_compile


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPUs: folders of drivers that are not there, and an empty PATH."""
    monkeypatch.setattr(gpus, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr(gpus, "AMD", tmp_path / "amd")
    for name in (*gpus.HIDING, "RAY_ADDRESS", "CC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def command(bare: Path, name: str, script: str) -> None:
    path = bare / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def nvidia(bare: Path, number: int) -> None:
    for device in range(number):
        (bare / "nvidia" / f"0000:{device:02}:00.0").mkdir(parents=True)


def test_gpus_are_those_of_the_driver_that_are_not_hidden(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus.local_gpus() == 0
    nvidia(bare, 4)
    assert gpus.local_gpus() == 4
    for visible, expected in (("0,2", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus.local_gpus() == expected


def test_gpus_in_wsl_are_those_that_nvidia_smi_lists(bare: Path) -> None:
    command(bare, "nvidia-smi", 'echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)"')
    assert gpus.local_gpus() == 1


def test_amds_processors_are_no_gpus(bare: Path) -> None:
    for node, simds in enumerate((0, 304, 304)):
        folder = bare / "amd" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simds}\n")
    assert gpus.local_gpus() == 2


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for GPUs")
def test_a_build_for_cpus_is_told_before_ray_starts(bare: Path) -> None:
    nvidia(bare, 1)
    with pytest.raises(UserError, match="PyTorch is a CPU build"):
        check_resources(ComputeConfig(use_gpu=True))
    with pytest.raises(UserError, match="PyTorch is a CPU build"):
        check_gpu()


def test_a_missing_compiler_for_gpus_is_told_with_what_to_do(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia(bare, 1)
    config = override(Config(), {"compute.use_gpu": True})
    with pytest.raises(UserError, match="there is no gcc or clang or cc.*train.compile=false"):
        check_training(config)
    command(bare, "clang", "")
    monkeypatch.setattr("sysconfig.get_path", lambda *names: str(bare))
    assert "Python.h" in (why_not_compile(on_gpu=True) or "")
    assert "-dev)" in (why_not_compile(on_gpu=True) or "")
    (bare / "Python.h").touch()
    assert why_not_compile(on_gpu=True) is None
    monkeypatch.setenv("CC", "nowhere-cc")
    assert "nowhere-cc" in (why_not_compile(on_gpu=True) or "")


def test_compiling_is_for_gpus_unless_told(bare: Path) -> None:
    """On a CPU nothing is compiled by default, so that no compiler is asked for."""
    assert not os.listdir(bare / "bin")
    check_training(Config())
    with pytest.raises(UserError, match="C[+][+] compiler"):
        check_training(override(Config(), {"train.compile": True}))
    assert not Config().train.compiles(on_gpu=False) and Config().train.compiles(on_gpu=True)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_120", "compute_120"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 0), ["sm_90", "sm_120"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
    ],
)
def test_code_runs_on_gpus_of_its_generation(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    assert runs_on(capability, built_for) == runs


@pytest.mark.parametrize(("size", "smaller"), [(32, "=16"), (15, "=5"), (7, "=1")])
def test_too_little_memory_names_the_key_to_lower(size: int, smaller: str) -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.30 GiB. GPU 0 has a total capacity of 22.05 GiB "
        "of which 1.81 GiB is free. Including non-PyTorch memory, this process has 20.23 GiB in "
        "use. Of the allocated memory 19.61 GiB is allocated by PyTorch."
    )
    message = str(out_of_gpu_memory(error, key="train.micro_batch_size", size=size))
    assert f"lower train.micro_batch_size from {size}" in message
    assert f"train.micro_batch_size{smaller}" in message
    assert "Tried to allocate 2.30 GiB" in message and "22.05 GiB" in message
    with pytest.raises(RunFailed, match="train.block_size"), memory_told("serve.max_batch_size", 1):
        raise error


class CompilationError(Exception):
    """Triton's."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            CompilationError("at 3:5:\n    bits = lost\n    ^\nlost is not defined\n"),
            "CompilationError: lost is not defined",
        ),
        (
            ValueError("PTXAS error: `ptxas` failed\n`ptxas` stderr:\nptxas fatal"),
            "ValueError: PTXAS error: `ptxas` failed",
        ),
        (RuntimeError("Failed to find C compiler."), "Failed to find C compiler."),
        (
            subprocess.CalledProcessError(1, ["gcc", "/tmp/tmp1/cuda_utils.c"]),
            "Triton needs a C compiler and Python's headers to start kernels",
        ),
        (KeyError(), "KeyError"),
    ],
)
def test_a_kernel_that_fails_is_told_of_in_one_line(error: Exception, told: str) -> None:
    assert why_failed(error) == told


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    assert pick_dtype("auto", "cuda") == pick_dtype("fp32", "cuda") == torch.float32
    with pytest.raises(UserError, match="evaluate.precision=bf16: Tesla T4 .*=fp32"):
        pick_dtype("bf16", "cuda", key="evaluate.precision")
