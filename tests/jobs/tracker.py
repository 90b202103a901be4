"""A tracker to send runs to: it stands in for the package wandb and writes its calls to a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

_PACKAGE = """
import importlib.util
import json
import sys
from types import SimpleNamespace

def Settings(**settings):
    return settings

def _write(name, *call):
    with open({calls!r}, "a") as file:
        file.write(json.dumps([name, *call]) + "\\n")

def init(*, name, id, **rest):
    _write(name, "init", id)
    return SimpleNamespace(
        id=name, resumed=id is not None, summary={{}},
        define_metric=lambda metric, **settings: None,
        log=lambda values, step: _write(name, "log", step),
        finish=lambda exit_code: _write(name, "finish", exit_code),
    )
"""


def installed(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Have `import wandb` find the stand-in; return the file of its calls."""
    path, calls = folder / "wandb.py", folder / "wandb_calls"
    path.write_text(_PACKAGE.format(calls=str(calls)))
    spec = importlib.util.spec_from_file_location("wandb", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patch.setitem(sys.modules, "wandb", module)
    return calls


def calls(file: Path, run: str) -> list[Any]:
    """The calls for a run: name and argument."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row[1:] for row in rows if row[0] == run]


def exits(file: Path) -> dict[str, list[int]]:
    """The exit codes that each run was finished with."""
    names = dict.fromkeys(json.loads(line)[0] for line in file.read_text().splitlines())
    return {name: [code for call, code in calls(file, name) if call == "finish"] for name in names}
