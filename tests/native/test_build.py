"""Which backend a machine gets, and the native library's file."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptray.config import Config, ModelConfig, RunFailed, UserError, load_config
from gptray.generation.loading import faster_decoder
from gptray.jobs.engine_plan import build_engine_backend
from gptray.native import processor
from gptray.native.abi import load_library
from gptray.native.backend import GENERATE_KEY, TRAIN_KEY, check_native, why_not_native
from gptray.native.build import build_library, library_name
from gptray.native.build import cached_library as kept_library
from gptray.native.compiler import options, uses_tiles, why_no_library
from tests.generation.models import needs_native

on_x86 = pytest.mark.skipif(processor.on_arm(), reason="of x86's instructions")

QUICK = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exec g++ "$@" -O0 ;; esac
made="$0-$(echo "$*" | sed 's/ -o [^ ]*//' | cksum | tr -d ' ').o"
[ -f "$made" ] || g++ "$@" -O0 -o "$made" || exit
while [ "$1" != -o ]; do shift; done
cp "$made" "$2"
"""


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler that does not optimise, and compiles once what it is asked for with equal options.

    What it builds is not run here.
    """
    quick = tmp_path_factory.mktemp("bin") / "quick-g++"
    quick.write_text(QUICK)
    quick.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(quick))
        yield


def why_not() -> str | None:
    """Why this machine cannot generate with the library."""
    return why_not_native(use_gpu=False, look_at_cache=True)


def refused(message: str) -> None:
    """Check that native is refused by such a message."""
    with pytest.raises(UserError, match=f"generate.backend=native: {message}"):
        check_native(GENERATE_KEY, "native", use_gpu=False, look_at_cache=True)


def test_native_is_refused_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="train.backend=native: .*compute.use_gpu=true"):
        check_native(TRAIN_KEY, "native", use_gpu=True)
    monkeypatch.setenv("CXX", "nowhere-g++ -pipe")
    for other in ("auto", "torch"):
        check_native(GENERATE_KEY, other, use_gpu=False)
    refused(".*generate.backend=auto")


@on_x86
@needs_native
def test_a_compiler_that_cannot_build_it_is_told_from_one_that_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho 'unrecognized option' >&2; exit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(".*old-g.* does not support .*-mavx512bf16")
    with pytest.raises(RunFailed, match="unrecognized option"):
        build_library(key=GENERATE_KEY)
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_native
@pytest.mark.parametrize("script", ["exit 0", 'while [ "$1" != -o ]; do shift; done; echo a >"$2"'])
def test_a_compiler_that_writes_no_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    lazy = tmp_path / "lazy-g++"
    lazy.write_text(f'#!/bin/sh\ncase "$*" in *-E*|*--version*) exit 0;; esac\n{script}\n')
    lazy.chmod(0o755)
    monkeypatch.setenv("CXX", f"{lazy} -pipe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RunFailed) as told:
        build_library(key=GENERATE_KEY)
    assert str(told.value) == (
        f"the compiler {lazy} -pipe wrote no library; set CXX to another, or generate.backend="
        "torch to do without it"
    )
    assert not list((tmp_path / "cache" / "gptray").iterdir())


@pytest.mark.slow
@needs_native
def test_the_library_is_built_once_and_kept_where_only_its_user_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = build_library(key=GENERATE_KEY)
    stamp = built.stat().st_mtime_ns
    assert build_library(key=GENERATE_KEY) == built and built.stat().st_mtime_ns == stamp
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["gptray"]
    assert built.parent.stat().st_mode & 0o777 == 0o700


@needs_native
def test_a_cache_that_cannot_be_written_is_done_without_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    choice = faster_decoder(Config(), ModelConfig(vocab_size=300), max_batch_size=1)
    assert choice.backend == "torch"
    assert choice.why.startswith("generate.backend: PyTorch, because ")
    assert choice.why.endswith("file is not a folder (see XDG_CACHE_HOME)")
    refused(".*cannot be written: .*XDG_CACHE_HOME")
    with pytest.raises(RunFailed, match="cannot write .*generate.backend=torch to do without it"):
        build_library(key=GENERATE_KEY)


@pytest.mark.slow
@needs_native
def test_a_library_that_is_built_needs_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build_library(key=GENERATE_KEY).parent
    folder.chmod(0o500)
    assert why_not() is None
    folder.chmod(0o700)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder with the library in it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield build_library(key=GENERATE_KEY).parents[1]


@pytest.fixture
def kept(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library in a cache of the test's own."""
    shutil.copytree(good, tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return build_library(key=GENERATE_KEY)


@pytest.mark.slow
@needs_native
def test_no_damaged_library_is_taken_for_a_whole_one(kept: Path) -> None:
    whole, name = kept.read_bytes(), kept.stem.rpartition("-")[0]
    rng = random.Random(1)
    cuts = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    flips = []
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        flips.append(bytes(flipped))
    for damaged in (*cuts, *flips):
        kept.write_bytes(damaged)
        assert kept_library(name) is None
    kept.write_bytes(whole)
    assert kept_library(name) == kept


@pytest.mark.slow
@needs_native
def test_a_damaged_library_is_built_again_and_told(
    kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.write_bytes(kept.read_bytes()[:1000])
    with caplog.at_level("INFO", logger="gptray"):
        fresh = build_library(key=GENERATE_KEY)
    assert "is damaged or belongs to another user; building it again" in caplog.text
    assert fresh.stat().st_size > 1000 and [*fresh.parent.iterdir()] == [fresh]


@pytest.mark.slow
@needs_native
def test_a_folder_in_the_librarys_place_is_replaced(kept: Path) -> None:
    kept.unlink()
    (kept / "file").mkdir(parents=True)
    assert build_library(key=GENERATE_KEY) == kept and kept.is_file()


@needs_native
def test_a_relative_cache_folder_counts_for_nothing(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.chdir(tmp_path)
    assert build_library(key=GENERATE_KEY) == tmp_path / ".cache" / "gptray" / kept.name


@needs_native
def test_a_library_that_others_can_write_is_not_taken(kept: Path) -> None:
    name = kept.stem.rpartition("-")[0]
    for mode, found in ((0o666, None), (0o664, None), (0o644, kept)):
        kept.chmod(mode)
        assert kept_library(name) == found


@needs_native
@pytest.mark.parametrize(("mode", "closed"), [(0o775, 0o755), (0o777, 0o755), (0o770, 0o750)])
def test_an_own_cache_that_others_can_write_is_closed_to_them(
    kept: Path, caplog: pytest.LogCaptureFixture, mode: int, closed: int
) -> None:
    caplog.set_level("INFO", logger="gptray")
    folder, stamp = kept.parent, kept.stat().st_mtime_ns
    folder.chmod(mode)
    assert why_not() is None
    assert folder.stat().st_mode & 0o777 == mode, "only looked at"
    assert build_library(key=GENERATE_KEY) == kept and kept.stat().st_mtime_ns == stamp
    assert folder.stat().st_mode & 0o777 == closed
    build_library(key=GENERATE_KEY)
    assert caplog.messages == [
        f"other users could write to {folder}; their access has been removed"
    ]


def shared_by_link(folder: Path) -> None:
    shared = folder.rename(folder.with_name("shared"))
    shared.chmod(0o777)
    folder.symlink_to(shared)


def another_users(folder: Path) -> None:
    os.chown(folder, 12345, -1)


@needs_native
@pytest.mark.parametrize(
    ("give", "problem"),
    [
        (shared_by_link, "can be written by other users"),
        pytest.param(
            another_users,
            r"belongs to another user \(12345\)",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away"),
        ),
    ],
)
def test_a_cache_of_other_users_is_refused_or_done_without(
    kept: Path, give: Callable[[Path], None], problem: str
) -> None:
    give(kept.parent)
    with pytest.raises(RunFailed, match=f"{problem}, so no code is loaded"):
        build_library(key=GENERATE_KEY)
    assert problem.replace("\\", "") in (why_not() or "")


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    assert why_not() == (
        "/proc/.cache/gptray cannot be written: No such file or directory (see XDG_CACHE_HOME)"
    )


@pytest.fixture
def cpuinfo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[str], str]], None]:
    """Change what Linux says about this machine's processor."""

    def become(change: Callable[[str], str]) -> None:
        text = change(Path("/proc/cpuinfo").read_text("utf-8"))
        (tmp_path / "cpuinfo").write_text(text, "utf-8")
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")

    return become


@on_x86
@needs_native
def test_a_shared_cache_has_a_library_for_each_processor(
    kept: Path, cpuinfo: Callable[[Callable[[str], str]], None]
) -> None:
    cpuinfo(lambda text: text.replace(" avx512_bf16", " avx512_bf16 newer"))
    newer = build_library(key=GENERATE_KEY)
    assert newer != kept and newer.parent == kept.parent
    cpuinfo(str)
    assert build_library(key=GENERATE_KEY) == kept


@on_x86
@needs_native
def test_no_library_is_loaded_on_a_processor_that_lacks_its_instructions(
    kept: Path, cpuinfo: Callable[[Callable[[str], str]], None]
) -> None:
    cpuinfo(lambda text: text.replace(" avx512_bf16", ""))
    refused("this processor has no avx512_bf16")
    with pytest.raises(RunFailed) as told:
        build_library(key=GENERATE_KEY)
    assert str(told.value) == (
        "this processor has no avx512_bf16; set generate.backend=torch to do without it"
    )
    assert [*kept.parent.iterdir()] == [kept]


@pytest.mark.slow
@needs_native
def test_compilers_with_other_flags_have_libraries_of_their_own(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DNOTHING")
    assert build_library(key=GENERATE_KEY) != kept
    assert len([*kept.parent.glob("*.so")]) == 2


# System calls that always fail, and never.
FAILS, NEVER_FAILS = 10_000, 24  # none has that number; sched_yield


@pytest.fixture
def with_tiles(cpuinfo: Callable[[Callable[[str], str]], None]) -> None:
    """A processor that has tiles, as Linux tells of it."""
    tiles = " ".join(processor.TILES)
    cpuinfo(lambda text: text.replace(" avx512_bf16", f" avx512_bf16 {tiles}"))


@on_x86
@needs_native
@pytest.mark.usefixtures("with_tiles")
def test_tiles_are_used_where_processor_and_linux_give_them(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: Callable[[Callable[[str], str]], None]
) -> None:
    tiles, names = set(processor.TILES.values()), set()
    for call, used in ((NEVER_FAILS, tiles), (FAILS, set())):
        monkeypatch.setattr(processor, "ARCH_PRCTL", call)
        assert processor.may_use_tiles() == bool(used)
        assert tiles & set(options(tiles=uses_tiles())) == used
        names.add(library_name())
    assert len(names) == 2, "each has a library of its own"
    monkeypatch.setattr(processor, "ARCH_PRCTL", NEVER_FAILS)
    cpuinfo(lambda text: text.replace("amx_int8", ""))
    assert not uses_tiles(), "all of them or none"


@on_x86
@needs_native
@pytest.mark.usefixtures("with_tiles")
def test_a_compiler_that_knows_no_tiles_is_named_and_builds_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    monkeypatch.setattr(processor, "ARCH_PRCTL", NEVER_FAILS)
    monkeypatch.setenv("CXX", str(old))
    assert why_no_library() is None and not uses_tiles()
    assert caplog.messages == [
        f"the native library is built without AMX: the compiler {old} does not support "
        "-mamx-tile -mamx-bf16 -mamx-int8"
    ]


@on_x86
@needs_native
@pytest.mark.usefixtures("with_tiles")
@pytest.mark.skipif(
    processor.TILES.keys() <= processor.processor_flags(), reason="this processor has tiles"
)
def test_tiles_that_crash_in_a_trial_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "ARCH_PRCTL", NEVER_FAILS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ctypes.CDLL(str(build_library(key=TRAIN_KEY)))
    assert caplog.messages[-1] == (
        "the native library is built without AMX: a trial of it crashed or gave wrong products"
    )
    assert library.works_here() == 1, "it has no tiles"


@needs_native
def test_auto_generates_through_pytorch_where_the_build_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picky = tmp_path / "picky-g++"
    picky.write_text(
        '#!/bin/sh\ncase "$*" in *-E*) exit 0;; esac\necho "error: out of registers" >&2; exit 1\n'
    )
    picky.chmod(0o755)
    monkeypatch.setenv("CXX", str(picky))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    shape = ModelConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=300)
    choice = faster_decoder(Config(), shape, max_batch_size=1)
    assert choice.backend == "torch" and "out of registers" in caplog.text
    assert "because the native kernels failed in a trial" in choice.why
    assert not list(tmp_path.rglob("backends/*.json")), "it may be mended"
    with pytest.raises(RunFailed, match="out of registers"):
        build_engine_backend(load_config(None, ["generate.backend=native"]))


@needs_native
def test_a_library_that_cannot_be_loaded_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-g++"
    made = 'while [ "$1" != -o ]; do shift; done; printf \'\\177ELF\' >"$2"'
    broken.write_text(f'#!/bin/sh\ncase "$*" in *-E*|*--version*) exit 0;; esac\n{made}\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    shape = ModelConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=300)
    assert faster_decoder(Config(), shape, max_batch_size=1).backend == "torch"
    told = "^the native library cannot be loaded: .*; set generate.backend=torch to do without it$"
    with pytest.raises(RunFailed, match=told):
        load_library(key=GENERATE_KEY)
