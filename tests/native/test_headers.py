"""The C++ without warnings, and its headers against scalar loops under sanitizers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gptray.native.compiler import compiler
from gptray.native.processor import TILES, instruction_options, may_use_tiles, on_arm
from gptray.storage.files import cache_folder
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
FLAGS = ["-O0", "-g1", "-std=c++17", "-fopenmp", *instruction_options()]
OPTIONS = [*FLAGS, f"-I{NATIVE}"]
# With the processor's own tiles if it has any, and with scalar loops in place of them.
KINDS = {"": list(TILES.values()) if may_use_tiles() else [], "tiles": ["-DEMULATED_TILES"]}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# After so long nobody runs programs of other sources.
UNUSED_S = 24 * 3600
SYSTEM = [
    "arm_neon.h" if on_arm() else "immintrin.h",
    "algorithm",
    "cmath",
    "cstring",
    "functional",
    "random",
    "vector",
]
NAMES = sorted(path.stem[5:] for path in HERE.glob("test_*.cpp"))
# Of those, the ones of headers that multiply by panels.
TILED = ["attention_train", "frozen_train", "gemm", "grouped_decode", "head_loss", "heads_train"]
TILED += ["linear_decode", "linear_train", "panels", "tiles"]


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
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tests in C++ for each of KINDS, in one program with sanitizers.

    They are kept while neither sources nor compiler change: building them takes a minute.
    """
    cache = cache_folder()
    kept = cache / f"tests-{digest()}"
    if not kept.is_dir():
        programs = build_programs(tmp_path_factory.mktemp("native"))
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        for older in cache.glob("tests-*"):
            if time.time() - older.stat().st_mtime > UNUSED_S:
                shutil.rmtree(older)
        whole = Path(tempfile.mkdtemp(prefix="tests-", dir=cache))
        for program in programs:
            shutil.copy(program, whole)
        whole.rename(kept)
    os.utime(kept)
    return {kind: kept / f"main{kind}" for kind in KINDS}


def digest() -> str:
    """Of all that the programs are made of."""
    words = [*compiler(), *FLAGS, *WARNINGS, *SANITIZERS, *SYSTEM]
    seen = hashlib.sha256(repr([words, KINDS]).encode())
    seen.update(run(*compiler(), "--version").stdout.encode())
    sources = [path for folder in (HERE, NATIVE) for path in folder.glob("*.*")]
    for path in sorted(path for path in sources if path.suffix in (".cpp", ".h")):
        seen.update(f"{path.name}\0{path.read_text()}\0".encode())
    return seen.hexdigest()


def build_programs(folder: Path) -> list[Path]:
    """Write the programs into a folder."""
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

    def build(kind: str, source: Path) -> Path:
        made = folder / f"{source.stem}{kind}.o"
        options = [*OPTIONS, *KINDS[kind], *WARNINGS, "-Wno-unused-function", *SANITIZERS]
        options += ["-include", str(folder / f"system{kind}.h")]
        done = run(*compiler(), *options, "-c", "-o", made, source)
        assert done.returncode == 0, done.stdout
        return made

    made = []
    for kind in KINDS:
        precompile(folder / f"system{kind}.h", [*OPTIONS, *KINDS[kind], *WARNINGS, *SANITIZERS])
        names = TILED if kind else NAMES
        sources = [HERE / "main.cpp", *(HERE / f"test_{name}.cpp" for name in names)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(partial(build, kind), sources))
        made.append(folder / f"main{kind}")
        linked = run(*compiler(), "-fopenmp", *SANITIZERS, "-o", made[-1], *parts)
        assert linked.returncode == 0, linked.stdout
    return made


def precompile(path: Path, options: list[str]) -> None:
    """Write the system's headers that the tests include, read once for all of them."""
    path.write_text("".join(f"#include <{name}>\n" for name in SYSTEM))
    done = run(*compiler(), *options, "-x", "c++-header", "-o", f"{path}.gch", path)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("", name) for name in NAMES] + [("tiles", name) for name in TILED]
)
def test_a_header_computes_what_scalar_loops_compute(
    programs: dict[str, Path], kind: str, name: str
) -> None:
    # PyTorch's allocator may be preloaded around the tests; leaks are not looked for under ptrace.
    done = run(programs[kind], name, ASAN_OPTIONS="verify_asan_link_order=0:detect_leaks=0")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["decode.cpp", "train.cpp"])
def test_a_source_compiles_without_a_warning(name: str) -> None:
    done = run(*compiler(), *OPTIONS, *WARNINGS, "-fsyntax-only", NATIVE / name)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(on_arm(), reason="x86's instructions")
@pytest.mark.parametrize(
    ("name", "instructions"), [("decode", ("tdpbf16ps", "tdpbsud")), ("train", ("tdpbf16ps",))]
)
def test_a_source_compiles_without_a_warning_to_the_instructions_for_tiles(
    tmp_path: Path, name: str, instructions: tuple[str, ...]
) -> None:
    written = tmp_path / f"{name}.s"
    asked = [*OPTIONS, *TILES.values(), *WARNINGS, "-S", "-o"]
    done = run(*compiler(), *asked, written, NATIVE / f"{name}.cpp")
    assert done.returncode == 0, done.stdout
    for instruction in ("ldtilecfg", "tileloadd", "tilestored", "tilerelease", *instructions):
        assert f"\t{instruction}" in written.read_text()


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
        **dict.fromkeys(("avx512.h", "neon.h", "neon_pairs.h", "neon_words.h"), "simd.h"),
        "panel_layout.h": "gemm.h",
        "exp.h": "gelu.h",
        "norm.h": "norm_train.h",
        "decode.h": "linear_decode.h",
        "low_rank_decode.h": "linear_decode.h",
    }
    assert headers - included - below.keys() == {"abi.h"}
    assert set(below.values()) <= included
