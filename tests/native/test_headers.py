"""The C++ without warnings, and its headers against scalar loops under sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptray.native.compiler import compiler
from gptray.native.processor import INSTRUCTIONS
from tests.generation.models import needs_native

pytestmark = needs_native

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "gptray" / "native"
WARNINGS = [
    *("-Wall", "-Wextra", "-Werror"),
    # GCC's own intrinsics read vectors that are undefined on purpose.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
# Not optimised, so that all of it is compiled in some seconds.
OPTIONS = ["-O0", "-g1", "-std=c++17", "-fopenmp", f"-I{NATIVE}", *INSTRUCTIONS.values()]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tests in C++, in one program with sanitizers."""
    folder = tmp_path_factory.mktemp("native")
    (folder / "empty.cpp").write_text("int main() {}\n")
    empty: list[str | Path] = [
        *compiler(),
        *SANITIZERS,
        "-o",
        folder / "empty",
        folder / "empty.cpp",
    ]
    if run(*empty).returncode or run(folder / "empty").returncode:
        pytest.skip("this compiler has no sanitizers")

    def build(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        options = [*OPTIONS, *WARNINGS, "-Wno-unused-function", *SANITIZERS]
        done = run(*compiler(), *options, "-c", "-o", made, source)
        assert done.returncode == 0, done.stdout
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(build, sorted(HERE.glob("*.cpp"))))
    linked = run(*compiler(), "-fopenmp", *SANITIZERS, "-o", folder / "main", *parts)
    assert linked.returncode == 0, linked.stdout
    return folder / "main"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem[5:] for path in HERE.glob("test_*.cpp")))
def test_a_header_computes_what_scalar_loops_compute(program: Path, name: str) -> None:
    # PyTorch's allocator may be preloaded around the tests; leaks are not looked for under ptrace.
    done = run(program, name, ASAN_OPTIONS="verify_asan_link_order=0:detect_leaks=0")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["decode.cpp", "train.cpp"])
def test_a_source_compiles_without_a_warning(name: str) -> None:
    done = run(*compiler(), *OPTIONS, *WARNINGS, "-fsyntax-only", NATIVE / name)
    assert done.returncode == 0, done.stdout


def test_every_header_is_tested_or_described_by_the_library() -> None:
    included = {
        line.split('"')[1]
        for path in HERE.glob("test_*.cpp")
        for line in path.read_text().splitlines()
        if line.startswith('#include "')
    }
    headers = {path.name for path in NATIVE.glob("*.h")}
    below = {
        "activation.h": "frozen_train.h",
        "exp.h": "gelu.h",
        "norm.h": "norm_train.h",
        "decode.h": "linear_decode.h",
        "low_rank_decode.h": "linear_decode.h",
    }
    assert headers - included - below.keys() == {"abi.h"}
    assert set(below.values()) <= included
