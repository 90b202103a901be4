"""The floors of the house: who may import whom, and what no file may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("gptray", "jobs", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

# A file imports from lower floors and from its own folder.
FLOORS = {
    "gptray/config": 0,
    "gptray": 1,
    "gptray/data": 2,
    "gptray/model": 2,
    "gptray/training": 3,
    "gptray/generation": 3,
    "gptray/evaluation": 3,
    "gptray/tuning": 4,
    "gptray/serving": 4,
    "gptray/reports": 5,
    "gptray/jobs": 6,
    "gptray/cli": 7,
    "jobs": 8,
    "benchmarks": 8,
    "benchmarks/client_scripts": 8,
    "benchmarks/gpu_parts": 8,
}
WITHOUT_TORCH = ("gptray", "gptray/config", "gptray/data", "gptray/cli")
NEVER = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
LOADERS = ("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")


def folder_of(path: Path) -> str:
    """Return the floor's folder that a file belongs to; the command line is a floor of its own."""
    if (name := path.with_suffix("").as_posix()) in FLOORS:
        return name
    return path.parts[0] if len(path.parts) < 3 else "/".join(path.parts[:2])


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, and whether that happens when the file itself is imported."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), id(node) not in lazy
            if node.module in FLOORS:  # from gptray import data
                for name in node.names:
                    yield f"{node.module}.{name.name}", id(node) not in lazy


def wrong_import(folder: str, module: str, eager: bool) -> str | None:
    """Say why a file of this folder may not import this module."""
    package = module.split(".")[0]
    if module.startswith("."):
        return "relative import"
    if package == "gptray":
        other = "/".join(module.split(".")[:2])
        other = other if other in FLOORS else "gptray"
        if other != folder and FLOORS[other] >= FLOORS[folder]:
            return f"{other} is not below {folder}"
    if package in NEVER:
        return "runs code of the file that it reads"
    if package == "ray" and folder not in ("gptray/jobs", "benchmarks"):
        return "Ray is for jobs"
    if module.startswith("ray.") and ("._" in module):
        return "private part of Ray"
    if package == "torch" and folder in WITHOUT_TORCH:
        return "torch is for model and above"
    if package == "transformers" and (eager or folder in ("gptray", "gptray/config")):
        return "transformers takes seconds to import; import it inside the function"
    return None


def violations(path: Path, source: str) -> list[str]:
    """Return everything in a file that breaks a rule."""
    tree = ast.parse(source)
    folder = folder_of(path)
    found = [
        f"{path}: {module}: {why}"
        for module, eager in imported(tree)
        if (why := wrong_import(folder, module, eager))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node.func)} runs what it reads")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_to_its_floor(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gptray/config/schema.py", "from gptray.data.tokens import TokenData"),
        ("gptray/config/schema.py", "def f() -> None:\n    import torch"),
        ("gptray/cli.py", "import ray"),
        ("gptray/data/corpus.py", "from gptray.model.gpt import GPT"),
        ("gptray/data/corpus.py", "import torch.nn"),
        ("gptray/data/tokenizer.py", "from transformers import AutoTokenizer"),
        ("gptray/model/gpt.py", "import gptray.data"),
        ("gptray/model/gpt.py", "from gptray import data"),
        ("gptray/model/gpt.py", "from ..data import tokens"),
        ("gptray/training/loop.py", "from gptray.generation import sampling"),
        ("gptray/training/loop.py", "from ray import train"),
        ("gptray/training/checkpoint.py", "import pickle"),
        ("gptray/training/checkpoint.py", "import torch\nstate = torch.load('a')"),
        ("gptray/jobs/train/run.py", "import jobs.train\nfrom ray._private import worker"),
        ("gptray/jobs/train/run.py", "from gptray.cli import run_job"),
        ("jobs/train.py", "import ray"),
    ],
)
def test_breach_is_seen(path: str, source: str) -> None:
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gptray/cli.py", "from gptray.config import Config"),
        ("gptray/data/tokenizer.py", "def f() -> None:\n    import transformers"),
        ("gptray/training/loop.py", "import torch\nfrom gptray.data import tokens"),
        ("gptray/jobs/train/run.py", "import ray.train\nfrom gptray.training import loop"),
        ("jobs/train.py", "from gptray.jobs.train.run import train"),
    ],
)
def test_lawful_import_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(path) for path in FILES} <= set(FLOORS)
    assert not [path for path in FILES if path.stem in ("utils", "common", "helpers", "manager")]


def test_command_line_loads_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'rich'}"
    code = f"import sys, gptray.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
