"""Text that ships with every CPython: its documentation topics and the library's docstrings.

One document per topic and per module, in a fixed order; repeated paragraphs are removed before
any split. The text differs a little between Python versions.
"""

from __future__ import annotations

import ast
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptray.config import UserError

# Tests, programs and bundled wheels, which are not the library's own documentation.
_SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "_bundled",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def builtin_version() -> str:
    """The version of the text, which names the corpus in manifests."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def builtin_documents() -> list[str]:
    """The documents, without repeated paragraphs.

    Raises UserError if this Python has no documentation topics.
    """
    return list(_without_repeats([*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "data.source=builtin: this Python comes without its documentation "
            "(pydoc_data.topics); install its full standard library or name your own text"
        ) from None
    return [topics[name] for name in sorted(topics)]


def _modules(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        for name in sorted(files):
            if name.endswith(".py"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes are not ours to report
                    tree = ast.parse(Path(folder, name).read_bytes())
                docstrings = filter(None, map(ast.get_docstring, _documented(tree)))
                if text := "\n\n".join(docstrings):
                    yield text


def _documented(node: _Documented) -> Iterator[_Documented]:
    """The node, then its classes and functions in the order of the file."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            yield "\n\n".join(kept) + "\n"
