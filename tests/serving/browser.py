"""Chromium without a window, told what to do through its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")


class Moved(Exception):
    """The page that was asked has just given way to another one."""


class Tab:
    """A page of the browser; what it complains about in its console is collected."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._calls = read, write, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Page", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self._call("Page.navigate", url=url)
        self.until(f"location.href.startsWith('{url}') && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression; a promise's when it is fulfilled."""
        done = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for an expression to be true; looks again at every frame."""
        poll = "const poll = () => (%s) ? done() : requestAnimationFrame(poll); poll();"
        waiting = True
        while waiting:
            try:
                self.run(f"new Promise((done) => {{ {poll % condition} }})")
                waiting = False
            except Moved:
                pass

    def press(self, key: str, *, code: int, text: str = "", modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self._call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers,
                **extra,
            )  # fmt: skip

    def write(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Moved
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select([self._read], [], [], 60)[0], "the browser says nothing"
            self._rest += os.read(self._read, 1 << 16)
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser with its profile in a folder."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def pipes() -> None:
        # The protocol's places for them.
        os.dup2(to_browser[0], 3)
        os.dup2(from_browser[1], 4)

    process = subprocess.Popen(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        + ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
        + ["--disable-background-networking", "--no-proxy-server"],
        preexec_fn=pipes,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Tab(from_browser[0], to_browser[1])
    finally:
        process.terminate()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
