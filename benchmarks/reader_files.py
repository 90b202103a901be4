"""The files that README and docs/ take as the reader's own, made of text in every Python."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_files(folder: Path) -> None:
    """Write the files. The quick start's model has seen all of their text but book.txt's."""
    (folder / "book.txt").write_text(program_text()[:200_000], "utf-8")
    text = "\n\n".join(topics.values()).encode("ascii", "ignore").decode()
    lengths = {"train": 120_000, "val": 20_000, "other": 20_000}
    for name, length in (lengths | {"old": 20_000, "the-verdict": 20_000}).items():
        (folder / f"{name}.txt").write_text(text[:length], "utf-8")
        text = text[length:]
    stories = "<|endoftext|>\n".join(text[:100_000].split("\n\n"))
    (folder / "TinyStories.txt").write_text(stories, "utf-8")
    who, where, what = ["나는", "너는", "우리는", "그는"], ["집에서", "학교에서", "밖에서"], [
        "밥을 먹어", "책을 읽어", "노래를 불러", "친구를 만나", "잠을 자",
    ]  # fmt: skip
    with (folder / "chats.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Q", "A"])
        for number in range(30):
            for words in itertools.product(who, where, what):
                rows.writerow([f"{' '.join(words)}? {number}", f"응, {words[-1]}."])
    asked = [{"role": "user", "content": "Which topic?"}]
    chats = (asked + [{"role": "assistant", "content": name}] for name in [*topics] * 8)
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats), "utf-8"
    )
    prompts = [{"id": n, "prompt": f"The {word}"} for n, word in enumerate(text[:600].split())]
    lines = (json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text("".join(lines), "utf-8")
    (folder / "my.yaml").write_text(
        "generate: {input_path: prompts.jsonl, output_path: out-gpt2}\n", "utf-8"
    )


def program_text() -> str:
    """The standard library's programs without docstrings: text that `builtin` does not contain."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    programs = [ast.parse(path.read_bytes()) for path in files]
    for node in itertools.chain.from_iterable(map(ast.walk, programs)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [ast.Pass()]
    return "\n\n".join(map(ast.unparse, programs))
