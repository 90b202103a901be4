"""A cache folder of a test's own, and what it remembers of backends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptray.native import processor
from gptray.native.backend import GENERATE_KEY
from gptray.native.build import build_library


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the cache, with the native library in it; return where measurements are."""
    library = build_library(key=GENERATE_KEY)
    (folder / "gptray").mkdir(mode=0o700, parents=True)
    shutil.copy(library, folder / "gptray")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gptray" / "backends"


def remember(
    folder: Path, *, native: float, torch: float, busy: bool = False, until: float | None = None
) -> None:
    """Change every measurement that is kept."""
    paths = list(folder.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        seconds = {"native": native, "torch": torch}
        path.write_text(json.dumps({**record, "seconds": seconds, "busy": busy, "until": until}))


def become(path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Change what Linux says about this machine's processor, by a file to write."""
    path.write_text(change(Path("/proc/cpuinfo").read_text("utf-8")), "utf-8")
    monkeypatch.setattr(processor, "CPUINFO", path)


def another_model(cpuinfo: str) -> str:
    lines = cpuinfo.splitlines(keepends=True)
    return "".join("model name : Another\n" if "model name" in line else line for line in lines)
