"""Checks that Ray's processes run the very gptray that runs the job: it is exchanged by pickle."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import gptray
from gptray.config import UserError

_PACKAGE = Path(gptray.__file__).parent


@cache
def own_code() -> str:
    """A hash of the Python files of the gptray that this process runs."""
    return _code_of(_PACKAGE)


def _code_of(package: Path) -> str:
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
        code.update(path.read_bytes())
    return code.hexdigest()


def check_own_code() -> None:
    """Refuse to start in a folder with another gptray, such as a clone that has moved on.

    Ray's processes import from the driver's working directory first; a console script does not.
    """
    there = Path.cwd() / _PACKAGE.name
    if not (there / "__init__.py").is_file() or there.samefile(_PACKAGE):
        return
    if _code_of(there) != own_code():
        raise UserError(
            f"{there} is not the gptray that runs this job, {_PACKAGE}, but Ray's processes would "
            "import it from this folder: start the job from another folder, or install the one "
            f"that is here (pip install -e {there.parent})"
        )
