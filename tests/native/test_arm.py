"""The native code for ARM, cross-compiled and run by QEMU, and which of it a machine gets."""

from __future__ import annotations

import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptray import system
from gptray.native import processor
from gptray.native.build import library_name
from gptray.native.compiler import options
from tests.native.test_headers import HERE, NAMES, NATIVE, run

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
needs_cross = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (apt-get install g++-aarch64-linux-gnu qemu-user)",
)
# The compiler's option of each level, a processor that has no more, and the tests: those of what
# depends on the processor, and below the best level of what is otherwise there.
BASE, DOT, BF16, MATRIX = processor.ARM_BASE, *processor.ARM_LEVELS.values()
OTHERWISE = ["decode", "frozen_train", "gemm", "grouped_decode", "linear_train", "panels", "simd"]
LEVELS = {
    BASE: ("cortex-a72", OTHERWISE),
    DOT: ("neoverse-n1", ["gemm", "grouped_decode"]),
    BF16: ("max", OTHERWISE),
    MATRIX: ("max", [name for name in NAMES if name not in ("draw", "team", "tiles")]),
}
OPTIONS = ["-O1", "-std=c++17", "-fopenmp", f"-I{NATIVE}", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The programs of each level that have been built, by the fixture `program`."""
    return {}


@pytest.fixture
def program(
    level: str, programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A level's tests in C++, in one program for ARM."""
    if level in programs:
        return programs[level]
    folder = tmp_path_factory.mktemp("arm")

    def build(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        asked = [*OPTIONS, "-Wno-unused-function", level, "-c", "-o"]
        done = run(COMPILER, *asked, made, source)
        assert done.returncode == 0, done.stdout
        return made

    sources = [HERE / "main.cpp", *(HERE / f"test_{name}.cpp" for name in LEVELS[level][1])]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(build, sources))
    linked = run(COMPILER, "-static", "-fopenmp", "-o", folder / "main", *parts)
    assert linked.returncode == 0, linked.stdout
    programs[level] = folder / "main"
    return programs[level]


@needs_cross
@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "name"), [(level, name) for level, (_, names) in LEVELS.items() for name in names]
)
def test_a_header_computes_on_arm_what_scalar_loops_compute(
    program: Path, level: str, name: str
) -> None:
    done = run(EMULATOR, "-cpu", LEVELS[level][0], program, name, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout


@needs_cross
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["decode.cpp", "train.cpp"])
def test_a_source_compiles_for_arm_without_a_warning(name: str, level: str) -> None:
    done = run(COMPILER, *OPTIONS, level, "-fsyntax-only", NATIVE / name)
    assert done.returncode == 0, done.stdout


@needs_cross
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++ (apt-get install clang)")
@pytest.mark.parametrize("features", ["FEAT_DotProd", "FEAT_DotProd FEAT_BF16 FEAT_I8MM"])
@pytest.mark.parametrize("name", ["decode.cpp", "train.cpp"])
def test_clang_compiles_a_source_with_a_macs_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, features: str
) -> None:
    on_mac(monkeypatch, tmp_path, features)
    target = "--target=aarch64-linux-gnu"  # whose headers are there
    done = run("clang++", target, *options(tiles=False), "-fsyntax-only", NATIVE / name)
    assert done.returncode == 0, done.stdout


def on_linux(monkeypatch: pytest.MonkeyPatch, folder: Path, features: str) -> None:
    """Have this be Linux on an ARM processor of some features."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (folder / "cpuinfo").write_text(
        f"processor\t: 0\nFeatures\t: fp asimd {features}\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
    )
    monkeypatch.setattr(processor, "CPUINFO", folder / "cpuinfo")


def on_mac(monkeypatch: pytest.MonkeyPatch, folder: Path, features: str) -> None:
    """Have this be macOS on an Apple processor of some features."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    said = "".join(f"hw.optional.arm.{feature}) echo 1;;\n" for feature in features.split())
    sysctl = folder / "sysctl"
    said += "machdep.cpu.brand_string) echo Apple M9;;\n*) exit 1;;\n"
    sysctl.write_text(f'#!/bin/sh\ncase "$2" in\n{said}esac\n')
    sysctl.chmod(0o755)
    monkeypatch.setattr(system, "SYSCTL", sysctl)
    processor.mac_facts.cache_clear()


@pytest.mark.parametrize(
    ("become", "features"),
    [
        (on_linux, ("aes", "aes asimddp", "asimddp bf16", "asimddp sve i8mm bf16")),
        (
            on_mac,
            (
                "FEAT_AES",
                "FEAT_DotProd",
                "FEAT_DotProd FEAT_BF16",
                "FEAT_DotProd FEAT_I8MM FEAT_BF16",
            ),
        ),
    ],
)
def test_the_compiler_may_use_what_an_arm_processor_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, become: object, features: tuple[str, ...]
) -> None:
    assert callable(become)
    names = set()
    for level, told in zip(LEVELS, features, strict=True):
        become(monkeypatch, tmp_path, told)
        assert processor.why_not_here() is None
        asked = options(tiles=False)
        assert level in asked and not [one for one in asked if one.startswith("-mavx")]
        names.add(library_name())
    assert len(names) == len(LEVELS), "each has a library of its own"
    assert ("-Xpreprocessor" in asked) == (become is on_mac)
    assert become is on_linux or processor.processor_name() == "Apple M9"


@pytest.mark.parametrize(
    ("features", "level"), [("bf16", BASE), ("i8mm", BASE), ("asimddp i8mm", DOT)]
)
def test_a_compiler_is_asked_for_nothing_without_the_levels_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: str, level: str
) -> None:
    on_linux(monkeypatch, tmp_path, features)
    assert processor.instruction_options() == (level,)
