"""What a fresh clone promises: README's two lines, honest dependencies, a check that runs them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {
    "mlflow": "mlflow-skinny",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
}


@pytest.fixture
def project() -> dict[str, Any]:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project: dict[str, Any] = whole["project"]
    return project


def imported_packages(folder: str) -> set[str]:
    """Return the top-level names that a folder's files import, the standard library left out."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"gptray", "_typeshed"}  # type checkers bring it


@pytest.mark.parametrize("folder", ["gptray", "jobs"])
def test_everything_imported_is_declared(folder: str, project: dict[str, Any]) -> None:
    # What an extra brings is imported where a setting asks for it; PyTorch brings Triton for GPUs.
    extras = ("optuna", "mlflow", "wandb", "trackio")
    optional = [one for extra in extras for one in project["optional-dependencies"][extra]]
    lines = [*project["dependencies"], *optional, "triton"]
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in lines}
    imported = {
        DISTRIBUTIONS.get(name, name.lower().replace("_", "-"))
        for name in imported_packages(folder)
    }
    assert imported <= declared


def test_every_dependency_has_an_upper_bound(project: dict[str, Any]) -> None:
    open_ended = [line for line in project["dependencies"] if not re.search(r"<|==", line)]
    assert open_ended == []


def test_the_known_versions_are_within_the_bounds(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    known = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in known.values() if "+" in version]  # PyPI serves none
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        needed = Requirement(line)
        version = known.get(needed.name.lower().replace("_", "-"))
        assert version and needed.specifier.contains(version), line


def test_a_wheel_holds_the_types_and_every_file_that_is_not_python() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = whole["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    package = ROOT / "gptray"
    assert package / "py.typed" in shipped
    files = {path for path in package.rglob("*") if path.is_file()}
    files |= {package / "configs" / path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= shipped


def test_readme_opens_with_the_line_that_trains_and_the_line_that_tests() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", readme, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    train, test = [line for line in lines if line.startswith("python3 -m venv")][:2]
    assert lines.index(train) < 3
    assert train.endswith("python jobs/train.py")
    assert "-m pytest" in test
    first = next(line for line in readme.splitlines() if "-m pytest" in line)
    assert first == test  # the one that .ci/run takes


def test_a_python_that_is_too_old_is_told_so() -> None:
    script = ROOT / "setup.py"
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 7))
    old = f"import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path({str(script)!r})"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "gptray needs Python 3.11 to 3.14, and this is Python 3.10.13\n"


def test_ci_is_a_valid_script_that_may_be_run() -> None:
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_place_names_the_same_pythons(project: dict[str, Any]) -> None:
    supported = SpecifierSet(project["requires-python"])
    pythons = [one for one in (f"3.{minor}" for minor in range(30)) if one in supported]
    first, last = pythons[0], pythons[-1]
    classified = [line.rpartition(" :: ")[2] for line in project["classifiers"]]
    assert [one for one in classified if one.startswith("3.")] == pythons
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", "setup.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"Python {first} to {last}" in text, name
        assert not set(re.findall(r"[Pp]ython ?(3\.\d+)", text)) - {*pythons}, name
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"python(3\.\d+)", script) == pythons[::-1]
    workflow = (ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(workflow)["jobs"]["check"]["strategy"]["matrix"]["python"] == pythons


@pytest.mark.parametrize("folder", ["gptray", "jobs", "tests", "benchmarks"])
def test_no_model_folder_may_bring_code_of_its_own(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id=name), attr="from_pretrained")
                ) if name.startswith("Auto"):
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


def test_percentages_are_written_as_english_does() -> None:
    """No text of the package, its templates, configs or guides has a space before the sign."""
    spaced = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "gptray").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(^|\d) %(?!s)", node.value)
    ]
    guides = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    for path in (*(ROOT / "gptray").rglob("*.j2"), *(ROOT / "configs").rglob("*.*"), *guides):
        if re.search(r"(\d|\}\}) %(?!\})", path.read_text(encoding="utf-8")):
            spaced.append(path.name)
    assert spaced == []
