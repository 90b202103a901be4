"""Ways to damage files, for tests that look at what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]
DEEP = "[" * 100_000
# What may stand where JSON is expected.
NO_JSON: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"format": 1, "fi',
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "deep": DEEP.encode(),
    "binary": bytes(range(256)),
    "nuls": b"\0" * 300,
    "huge": b'{"format": 1' + b"0" * 5000 + b"}",
}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody may read a file meanwhile: root, who may read everything, becomes another user."""
    user, nobody = os.geteuid(), 65534
    path.chmod(0)
    try:
        if user == 0:
            os.seteuid(nobody)
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o644)


def text(name: str, content: str | bytes) -> Damage:
    """Put other content into a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def fields(name: str, **values: Any) -> Damage:
    """Set keys of a JSON object; `...` removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(values)
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))

    return damage


def both(*damages: Damage) -> Damage:
    """Do one after the other."""
    return lambda folder: [damage(folder) for damage in damages]


def gone(name: str) -> Damage:
    """Remove a file or a folder."""
    return lambda folder: _remove(folder / name)


def flipped(name: str, tenth: int) -> Damage:
    """Turn one bit, so many tenths into a file."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[min(len(data) * tenth // 10, len(data) - 1)] ^= 1
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, tenth: int) -> Damage:
    """Keep so many tenths of a file."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * tenth // 10])

    return damage


def folder_at(name: str) -> Damage:
    """Put a folder into a file's place."""

    def damage(folder: Path) -> None:
        _remove(folder / name)
        (folder / name).mkdir()

    return damage


def file_at(name: str) -> Damage:
    """Put a file into a folder's place."""

    def damage(folder: Path) -> None:
        _remove(folder / name)
        (folder / name).write_text("x")

    return damage


def pipe_at(name: str) -> Damage:
    """Put a pipe, at whose other end is nobody, into a file's place."""

    def damage(folder: Path) -> None:
        _remove(folder / name)
        os.mkfifo(folder / name)

    return damage


def link_at(name: str, target: str | Path) -> Damage:
    """Put a link into a file's place."""

    def damage(folder: Path) -> None:
        _remove(folder / name)
        (folder / name).symlink_to(target)

    return damage


@contextmanager
def deadline(seconds: int = 60) -> Iterator[None]:
    """End a test that hangs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def assert_a_sentence(error: Exception) -> None:
    """A message for a person: short, no traceback, one line a mistake."""
    message = str(error)
    assert message and "Traceback" not in message and len(message) < 1500


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
