"""Which backend a machine gets, and the native library's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import RunFailed, UserError
from gptray.generation.build import library, pick_backend
from tests.generation.models import needs_native


def test_a_gpu_and_a_machine_without_a_compiler_get_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pick_backend("auto", use_gpu=True) == "torch"
    monkeypatch.setenv("CXX", "nowhere-g++ -pipe")
    assert pick_backend("auto", use_gpu=False) == "torch"
    assert pick_backend("torch", use_gpu=False) == "torch"


def test_native_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="generate.backend=native: .*compute.use_gpu=true"):
        pick_backend("native", use_gpu=True)
    monkeypatch.setenv("CXX", "nowhere-g++")
    with pytest.raises(UserError, match="generate.backend=native: .*generate.backend=auto"):
        pick_backend("native", use_gpu=False)


@needs_native
def test_a_compiler_that_cannot_build_it_is_told_from_one_that_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho 'unrecognized option' >&2; exit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="old-g.* does not know .*-mavx512bf16"):
        pick_backend("native", use_gpu=False)
    with pytest.raises(RunFailed, match="unrecognized option"):
        library()
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_native
def test_the_library_is_built_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = library()
    stamp = built.stat().st_mtime_ns
    assert library() == built and built.stat().st_mtime_ns == stamp
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["gptray"]


@needs_native
def test_a_cache_that_cannot_be_written_is_done_without_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("INFO", logger="gptray"):
        assert pick_backend("auto", use_gpu=False) == "torch"
    assert "PyTorch, since XDG_CACHE_HOME: " in caplog.text and "is not a folder" in caplog.text
    with pytest.raises(UserError, match="generate.backend=native: XDG_CACHE_HOME: .*cannot be"):
        pick_backend("native", use_gpu=False)
    with pytest.raises(RunFailed, match="cannot write .*generate.backend=torch does without it"):
        library()


@needs_native
def test_a_library_that_is_built_needs_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = library().parent
    folder.chmod(0o500)
    assert pick_backend("auto", use_gpu=False) == "native"
    folder.chmod(0o700)
