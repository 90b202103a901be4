"""The floors of the house: who may import whom, what no file may use, and how large files grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gptray

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
    "gptray/storage": 1.2,
    "gptray/gguf": 1.4,
    "gptray/native": 1.5,
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
WITHOUT_TORCH = (
    "gptray",
    "gptray/config",
    "gptray/storage",
    "gptray/gguf",
    "gptray/native",
    "gptray/data",
    "gptray/cli",
)
NEVER = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
LOADERS = ("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
PACKAGE = [path for path in FILES if path.parts[0] == "gptray"]
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "gptray").rglob("*")
    if path.suffix in (".py", ".cpp", ".h")
)

SHARED_BY_JOBS = ("jobs/cluster", "jobs/folders", "jobs/progress")
LINES = 300
FUNCTION_LINES = 60
LATE_IMPORTS = 9  # of gptray's own modules, inside functions
LATE_RAY = [  # it imports torch
    "gptray/jobs/train/fitting.py: ray.train.torch",
    "gptray/jobs/train/fitting.py: ray.train.torch.TorchConfig",
]
ANY = 71  # annotations and casts


# The package's own entry points stand above its jobs; what they call does not use them.
ENTRY_POINTS = ("gptray/__init__.py", "gptray/__main__.py", "gptray/entry_points.py")
PUBLIC = {f"gptray.{name}" for name in gptray.__all__}


def folder_of(path: Path) -> str:
    """Return the floor's folder that a file belongs to; the command line is a floor of its own."""
    if path.as_posix() in ENTRY_POINTS:
        return "jobs"
    if (name := path.with_suffix("").as_posix()) in FLOORS:
        return name
    return path.parts[0] if len(path.parts) < 3 else "/".join(path.parts[:2])


def imported(tree: ast.AST, *, eager: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, and whether that happens when the file itself is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, eager
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), eager
            module = node.module or ""
            if module == "gptray" or module.split(".")[0] == "ray":  # from gptray import data
                for name in node.names:
                    yield f"{node.module}.{name.name}", eager
        elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):  # it may hold others
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imported(node, eager=eager and not lazy)


def wrong_import(folder: str, module: str, eager: bool) -> str | None:
    """Say why a file of this folder may not import this module."""
    package = module.split(".")[0]
    if module.startswith("."):
        return "relative import"
    if package == "gptray":
        if module in PUBLIC and FLOORS[folder] < FLOORS["jobs"]:
            return "the package's entry points are for users"
        other = "/".join(module.split(".")[:2])
        other = other if other in FLOORS else "gptray"
        if other != folder and FLOORS[other] >= FLOORS[folder]:
            return f"{other} is not below {folder}"
    if package in ("jobs", "benchmarks") and FLOORS[package] > FLOORS[folder]:
        return f"{package} is not below {folder}"
    if package in NEVER:
        return "runs code of the file that it reads"
    if package == "ray" and folder not in ("gptray/jobs", "benchmarks"):
        return "Ray is for jobs"
    if package == "ray" and any(part.startswith("_") for part in module.split(".")):
        return "private part of Ray"
    if package == "torch" and folder in WITHOUT_TORCH:
        return "torch is for model and above"
    if package == "transformers" and (eager or folder in ("gptray", "gptray/config")):
        return "transformers takes seconds to import; import it inside the function"
    return None


def violations(path: Path, tree: ast.Module) -> list[str]:
    """Return everything in a file that breaks a rule."""
    folder = folder_of(path)
    found = [
        f"{path}: {module}: {why}"
        for module, eager in imported(tree)
        if (why := wrong_import(folder, module, eager))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := name_of(node.func)) in LOADERS:
            found.append(f"{path}:{node.lineno}: {name} runs what it reads")
    return found


def name_of(function: ast.expr) -> str:
    """A function's name in a call, of two words at most, such as yaml.load."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_to_its_floor(path: Path) -> None:
    assert violations(path, tree_of(path)) == []


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
        ("gptray/jobs/train/run.py", "import jobs.train"),
        ("gptray/jobs/train/run.py", "from ray._private import worker"),
        ("gptray/jobs/train/run.py", "from ray.train import _internal"),
        ("gptray/jobs/train/run.py", "from gptray.cli import run_job"),
        ("jobs/train.py", "import ray"),
        ("gptray/generation/engine.py", "from gptray.jobs.generate.llm import LLM"),
        ("gptray/jobs/tune/run.py", "from gptray import train"),
        ("gptray/__init__.py", "import ray"),
    ],
)
def test_breach_is_seen(path: str, source: str) -> None:
    assert violations(Path(path), ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gptray/cli.py", "from gptray.config import Config"),
        ("gptray/data/tokenizer.py", "def f() -> None:\n    import transformers"),
        ("gptray/training/loop.py", "import torch\nfrom gptray.data import tokens"),
        ("gptray/jobs/train/run.py", "import ray.train\nfrom gptray.training import loop"),
        ("jobs/train.py", "from gptray.jobs.train.run import train"),
        ("gptray/__init__.py", "from gptray.jobs.train.run import train"),
        ("benchmarks/turns.py", "from gptray import LLM"),
    ],
)
def test_lawful_import_passes(path: str, source: str) -> None:
    assert violations(Path(path), ast.parse(source)) == []


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(path) for path in FILES} <= set(FLOORS)
    assert not [path for path in FILES if path.stem in ("utils", "common", "helpers", "manager")]


@pytest.mark.parametrize("module", ["gptray", "gptray.entry_points"])
def test_the_doors_load_neither_torch_nor_ray(module: str) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'rich'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def exceeding(counts: Mapping[str, int], limit: int) -> list[str]:
    """What is above the limit."""
    return [f"{name}: {count}" for name, count in counts.items() if count > limit]


def test_no_file_is_longer_than_one_sitting() -> None:
    lines = {
        path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in SOURCES
    }
    assert exceeding(lines, LINES) == []


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{path.as_posix()}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PACKAGE
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert exceeding(lengths, FUNCTION_LINES) == []


def test_no_file_name_stands_twice() -> None:
    def beside_a_job(path: Path) -> bool:
        folder = "/".join(path.parts[1:-1])
        return folder.startswith(("jobs/", "reports/")) and folder not in SHARED_BY_JOBS

    names = Counter(path.name for path in PACKAGE if not beside_a_job(path))
    del names["__init__.py"]
    assert exceeding(names, 1) == []


def test_own_modules_are_imported_at_the_top() -> None:
    late = [
        f"{path}: {module}"
        for path in PACKAGE
        for module, eager in imported(tree_of(path))
        if module.startswith("gptray") and not eager
    ]
    assert len(late) <= LATE_IMPORTS, "\n".join(late)


def test_ray_is_imported_at_the_top() -> None:
    late = [
        f"{path}: {module}"
        for path in PACKAGE
        for module, eager in imported(tree_of(path))
        if module.split(".")[0] == "ray" and not eager
    ]
    assert late == LATE_RAY


def test_any_does_not_spread() -> None:
    counts = {
        path: sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))
        for path in PACKAGE
        if (tree := tree_of(path))
    }
    most = [f"{path}: {count}" for path, count in Counter(counts).most_common(10)]
    assert sum(counts.values()) <= ANY, "\n".join([f"{sum(counts.values())} in all", *most])


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {path: ".".join(path.with_suffix("").parts) for path in PACKAGE}
    graph = {module: imports_of(path) & {*modules.values()} for path, module in modules.items()}
    del graph["gptray.__init__"]  # it loads what it names only when asked for it
    assert circle(graph) == []


def test_no_folders_of_jobs_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE:
        if path.parts[:2] == ("gptray", "jobs"):
            folder = ".".join(path.with_suffix("").parts[:3])
            others = {".".join(module.split(".")[:3]) for module in imports_of(path)}
            graph.setdefault(folder, set()).update(others - {folder, "gptray.jobs"})
    assert circle(graph) == []


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere."""
    return {module for module, _ in imported(tree_of(path))}


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle in a graph of what imports what; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))
