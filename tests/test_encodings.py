"""Files are UTF-8 wherever the job runs, and no terminal's encoding ends one."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptray.entry_points import run

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    path for part in ("gptray", "jobs", "benchmarks") for path in (ROOT / part).rglob("*.py")
]


def guesses_its_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file as text and leaves its encoding to the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named:
        return False
    if name == "read_text":
        return len(call.args) < 1
    if name == "write_text":
        return len(call.args) < 2
    if name not in ("open", "fdopen") or (isinstance(owner, ast.Name) and owner.id[0].isupper()):
        return False
    if isinstance(owner, ast.Name) and owner.id == "os" and name == "open":
        return False  # a descriptor
    place = 0 if owner is not None and name == "open" else 1
    mode = named.get("mode") or (call.args[place] if len(call.args) > place else None)
    if mode is None:
        # `SourceFile.open()` gives bytes; a path's does not.
        return not (isinstance(owner, ast.Name) and owner.id in ("file", "direct"))
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value


def guesses(source: str) -> list[int]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if guesses_its_encoding(call)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_its_encoding_named(path: Path) -> None:
    assert not guesses(path.read_text("utf-8")), "name the encoding of these lines"


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()",
        "path.write_text(text)",
        "path.open()",
        "path.open('w')",
        "open(path)",
        "open(path, 'a')",
        "os.fdopen(1, 'w')",
    ],
)
def test_a_call_that_leaves_the_encoding_to_the_locale_is_found(call: str) -> None:
    assert guesses(call) == [1]


@pytest.mark.parametrize(
    "call",
    ["path.read_text('utf-8')", "path.open('rb')", "open(path, 'wb')", "os.open(path, 0)"],
)
def test_bytes_and_named_encodings_are_fine(call: str) -> None:
    assert guesses(call) == []


# A locale that every machine has, and nothing that makes up for it.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_korean_paths_and_prompts_are_understood_in_a_locale_without_korean(
    tmp_path: Path,
) -> None:
    text = tmp_path / "\ud55c\uae00.txt"
    text.write_text("\uc61b\ub0a0 \uc61b\uc801\uc5d0", "utf-8")
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--dry-run"]
    command += [f"data.source={text}", f"storage_path={tmp_path}/out", "sample.prompt=\uc61b\ub0a0"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"}
    environment |= PLAIN
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert rb"source: " in done.stdout and rb"\ud55c\uae00.txt" in done.stdout
    assert done.stdout.isascii()


ENCODINGS = ["ascii", "iso-8859-1", "euc-kr"]
ARGUMENTS = [["--help"], ["--dry-run"], ["--dry-run", "data.source=없다"]]


def words_of(tmp_path: Path, arguments: list[str]) -> list[str]:
    """A training's command line with a config that no small encoding can spell."""
    config = tmp_path / "my.yaml"
    config.write_text('sample: {prompt: "옛날 옛적에 — été 🎈"}\n', "utf-8")
    return [f"--config={config}", f"storage_path={tmp_path}", *arguments]


def check_ended(code: int, said: bytes, arguments: list[str]) -> None:
    assert b"Traceback" not in said and b"UnicodeEncodeError" not in said
    assert code == (2 if "data.source=없다" in arguments else 0), said


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_terminal_that_lacks_characters_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, arguments: list[str]
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = run("train", words_of(tmp_path, arguments))
    err.flush()
    assert isinstance(err.buffer, io.BytesIO)
    check_ended(code, err.buffer.getvalue(), arguments)


@pytest.mark.parametrize(
    ("encoding", "arguments"), list(zip(ENCODINGS, ARGUMENTS, strict=True)), ids=ENCODINGS
)
def test_a_process_whose_terminal_lacks_characters_ends_as_any_other(
    tmp_path: Path, encoding: str, arguments: list[str]
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *words_of(tmp_path, arguments)]
    environment = {**os.environ, **PLAIN, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
    check_ended(done.returncode, done.stderr, arguments)
