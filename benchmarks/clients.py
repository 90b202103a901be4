"""Calls an endpoint with popular clients and their defaults.

  python benchmarks/clients.py --python ~/venvs/litellm ~/venvs/llm --node ~/node
  python benchmarks/clients.py --url http://127.0.0.1:8000/v1 --model book

Tries litellm, langchain-openai, llama-index, llm and openai if one of the Pythons has them
(--python: virtual environments; by default this one), and npm's openai and Vercel AI SDK if a
folder with node_modules is given (--node). Each client's calls are in benchmarks/client_scripts/.
Without --url, an endpoint with a tiny model is started. Prints a table of clients and calls: `ok`,
`refused` if the API is unsupported and the answer says what to call instead, or what went wrong.
Prints, last, one JSON line; exit code 1 if a call failed or no client is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve import running_server
from tiny import make_tiny_model

SCRIPTS = Path(__file__).resolve().parent / "client_scripts"
# The module or packages of each client.
PYTHON = {
    "openai": "openai",
    "litellm": "litellm",
    "langchain": "langchain_openai",
    "llamaindex": "llama_index.llms.openai_like",
    "llm": "llm",
}
NODE = {"openai": ("openai",), "vercel": ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")}
TIMEOUT_S = 180
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def commands(pythons: Sequence[str], node: str | None) -> dict[str, list[str]]:
    """The command that runs each installed client's script."""
    found: dict[str, list[str]] = {}
    for python in pythons or [sys.executable]:
        inside = Path(python).expanduser() / "bin" / "python"
        path = str(inside) if inside.is_file() else python
        for name, module in PYTHON.items():
            code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
            is_there = subprocess.run([path, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
            # Most of the others depend on openai, maybe an older one: the first found counts.
            if is_there and name not in found:
                found[name] = [path, str(SCRIPTS / f"with_{name}.py")]
    for name, packages in NODE.items() if node and shutil.which("node") else ():
        assert node
        folder = Path(node).expanduser()
        if all((folder / "node_modules" / package).is_dir() for package in packages):
            found[f"{name} (npm)"] = ["node", str(_next_to(folder) / f"with_{name}.mjs")]
    return found


def _next_to(folder: Path) -> Path:
    """Copy the scripts next to the packages, since Node looks for these upwards from the script."""
    scripts = folder / ".gptray-clients"
    scripts.mkdir(exist_ok=True)
    for script in SCRIPTS.glob("*.mjs"):
        shutil.copy(script, scripts)
    return scripts


def calls(command: Sequence[str], url: str, model: str) -> list[dict[str, Any]]:
    """Run a client's script; return its report, a row for each call."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HOME": home, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            [*command, url, model], capture_output=True, text=True, env=env, timeout=TIMEOUT_S
        )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"call"')]
    if done.returncode or not rows:
        rows.append({"call": "script", "ok": False, "said": done.stderr.strip()[-500:]})
    return rows


def outcome(row: dict[str, Any]) -> str:
    """One word for a successful call, the error for another."""
    said = row["said"] if isinstance(row["said"], str) else ""
    if row["ok"]:
        return "refused" if said.startswith("refused: ") else "ok"
    return " ".join(said.split())[:160]


@contextmanager
def endpoint(url: str | None, model: str | None) -> Iterator[tuple[str, str]]:
    """The URL and model name of the given endpoint, or of a new one with a tiny model."""
    if url:
        yield url, model or "model"
        return
    with tempfile.TemporaryDirectory() as runs:
        folder = Path(runs, "tiny")
        make_tiny_model(folder)
        folder.joinpath("chat_template.jinja").write_text(TEMPLATE, "utf-8")
        with running_server("gptray", str(folder)) as port:
            yield f"http://127.0.0.1:{port}/v1", folder.name


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="of a running endpoint, up to /v1")
    parser.add_argument("--model", help="the name under which it serves its model")
    parser.add_argument("--python", nargs="+", default=[], help="interpreters or environments")
    parser.add_argument("--node", help="a folder with node_modules")
    arguments = parser.parse_args()
    found = commands(arguments.python, arguments.node)
    rows: list[tuple[str, dict[str, Any]]] = []
    if found:
        with endpoint(arguments.url, arguments.model) as (url, model):
            for name, command in found.items():
                rows += [(name, row) for row in calls(command, url, model)]
    for name, row in rows:
        print(f"{name:14} {row['call']:22} {outcome(row)}")
    missing = [name for name in (*PYTHON, *(f"{one} (npm)" for one in NODE)) if name not in found]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    good = sum(row["ok"] for _, row in rows)
    print(json.dumps({"clients": len(found), "calls": len(rows), "good": good}))
    return 0 if rows and good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
