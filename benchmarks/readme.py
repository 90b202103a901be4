"""Type the commands of README and docs/, block by block, in a fresh clone with a fresh HOME.

  python benchmarks/readme.py                     all of them; about an hour on two cores
  python benchmarks/readme.py --skip pytest       all except commands that contain this word
  python benchmarks/readme.py --keep FOLDER       keep the clone, HOME and outputs there
  python benchmarks/readme.py --keep FOLDER --pages tuning runs       these pages, in that folder

One bash runs every line of every bash block as written, and feeds Python blocks to `python`:
README's, then those of the pages that it links to, in that order. The reader's own files (book.txt,
prompts.jsonl ...) are written beforehand. Models from the hub are replaced by small folders of the
same name, unless --hub is given. A server runs until the next command that is not Python. Ray's
ports must be free. Prints a table with each command's time and, last, one JSON line; exit code 1 if
any command failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from reader_files import write_files

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 3600.0
# Prefixes of variables that a reader has not set: Python's, Ray's and the libraries' own.
FOREIGN = ("PYTHON", "RAY_", "VIRTUAL_ENV", "XDG_", "HF_", "TRANSFORMERS_", "OMP_", "CXX")

# Run in the environment that README's first command creates.
PARQUET = """
import pyarrow.json, pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.json.read_json("prompts.jsonl"), "prompts.parquet")
"""
# Replace the hub's GPT-2 and Qwen3.
SMALL_MODELS = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import Qwen3Config, Qwen3ForCausalLM
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(
    vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
)
bpe.train(["book.txt"], trainer)
for name in ("gpt2", "Qwen/Qwen3-0.6B"):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    if name != "gpt2":
        fast.chat_template = (
            "{% for one in messages %}{{ one.role }}: {{ one.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    fast.save_pretrained(name)
config = GPT2Config(
    vocab_size=1000, n_layer=2, n_head=4, n_embd=64, bos_token_id=0, eos_token_id=0
)
GPT2LMHeadModel(config).save_pretrained("gpt2")
config = Qwen3Config(
    vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0,
    bos_token_id=0,
)
Qwen3ForCausalLM(config).save_pretrained("Qwen/Qwen3-0.6B")
"""


@dataclass(frozen=True)
class Command:
    """One command as a reader types it. place: its page and line."""

    place: str
    language: str
    text: str

    @property
    def is_server(self) -> bool:
        return "jobs/serve.py" in self.text

    @property
    def typed(self) -> str:
        return f"python - <<'END'\n{self.text}\nEND" if self.language == "python" else self.text


@dataclass(frozen=True)
class Outcome:
    """How a command ended. reason: the last line it printed if it failed, otherwise empty."""

    command: Command
    seconds: float
    reason: str

    def __str__(self) -> str:
        said, first = self.reason or "ok", self.command.text.splitlines()[0]
        return f"{self.command.place:20} {self.seconds:7.1f} s  {said:30.200}  {first:.90}"


def pages(clone: Path) -> list[Path]:
    """README and the pages of docs/ that it links to, in that order."""
    readme = clone / "README.md"
    linked = re.findall(r"\]\((docs/\w+\.md)\)", readme.read_text("utf-8"))
    return [readme, *(clone / name for name in dict.fromkeys(linked))]


def commands(page: Path) -> Iterator[Command]:
    """The commands of a Markdown page's bash and python blocks, in order."""
    page_text = page.read_text("utf-8")
    for block in re.finditer(r"^```(bash|python)\n(.*?)^```$", page_text, re.M | re.S):
        language, text = block.groups()
        number = page_text.count("\n", 0, block.start(2)) + 1
        if language == "python":
            yield Command(f"{page.name}:{number}", language, text.rstrip())
            continue
        for command in re.finditer(r"(?:.*\\\n)*.*\n", text):
            if command[0].strip() and not command[0].startswith("#"):
                line = number + text.count("\n", 0, command.start())
                yield Command(f"{page.name}:{line}", language, command[0].rstrip())


class Shell:
    """A bash that runs from the first command to the last, like a reader's terminal."""

    def __init__(self, folder: Path, env: dict[str, str], outputs: Path) -> None:
        self._outputs = outputs
        self._bash = subprocess.Popen(
            ["bash"], cwd=folder, env=env, text=True, bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._bash.stdin is not None and self._bash.stdout is not None
        self._in: IO[str] = self._bash.stdin
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bash.stdout, selectors.EVENT_READ)

    def run(self, text: str, name: str) -> int:
        """Run a command to its end; return its exit status. Raises TimeoutError."""
        self._type(f"{{ {text}\n}} {self._redirections(name)}; echo $?")
        assert self._bash.stdout is not None
        if not self._selector.select(DEADLINE_S):
            raise TimeoutError
        return int(self._bash.stdout.readline() or -1)

    def start(self, text: str, name: str) -> int:
        """Start a server and wait until it answers; return 0 if it does. Raises TimeoutError."""
        # A non-interactive shell makes its background jobs ignore SIGINT, so SIGTERM ends them.
        self.run(f"{text} & server=$!", name)
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if '"url"' in self.output(name):
                return 0
            if self.run("kill -0 $server", "server-alive"):
                return self.run("wait $server", "server-wait") or -1
            time.sleep(0.5)
        raise TimeoutError

    def stop(self) -> int:
        """Stop the server like a service manager; return its exit status."""
        return self.run("kill $server; wait $server", "server-stop")

    def output(self, name: str, stream: str = "out") -> str:
        return (self._outputs / f"{name}.{stream}").read_text("utf-8", errors="replace")

    def close(self) -> None:
        """Leave the terminal, ending whatever still runs in it."""
        self._in.close()
        with self._bash:
            if self._bash.poll() is None:
                os.killpg(self._bash.pid, signal.SIGTERM)

    def _redirections(self, name: str) -> str:
        return f"</dev/null >{self._outputs / name}.out 2>{self._outputs / name}.err"

    def _type(self, line: str) -> None:
        self._in.write(f"{line}\n")


def type_all(shell: Shell, todo: list[Command]) -> Iterator[Outcome]:
    """Run the commands in order; a server runs until the next command that is not Python."""
    server: Command | None = None
    for command in todo:
        if server and command.language == "bash":
            yield _outcome(server, shell.stop, shell, "server-stop")
            server = None
        print(f"{command.place}: {command.text.splitlines()[0]}", file=sys.stderr)
        name = command.place.replace(":", "-")
        run = partial(shell.start if command.is_server else shell.run, command.typed, name)
        outcome = _outcome(command, run, shell, name)
        server = command if command.is_server and not outcome.reason else server
        yield outcome
    if server:
        yield _outcome(server, shell.stop, shell, "server-stop")


def _outcome(command: Command, run: Callable[[], int], shell: Shell, name: str) -> Outcome:
    begin = time.monotonic()
    status = run()
    said = shell.output(name, "err").strip().splitlines() or [f"exit status {status}"]
    return Outcome(command, time.monotonic() - begin, said[-1] if status else "")


def environment(home: Path, python_folder: Path) -> dict[str, str]:
    """A reader's environment: an empty HOME, and a `python3` that runs this Python."""
    python = python_folder / "python3"
    python.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).resolve()}" "$@"\n', "utf-8")
    python.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    inside = Path(sys.prefix, "bin")
    paths = [one for one in kept.get("PATH", "").split(os.pathsep) if Path(one) != inside]
    return kept | {"HOME": str(home), "PATH": os.pathsep.join([str(python_folder), *paths])}


@contextmanager
def terminal(work: Path) -> Iterator[tuple[Shell, Path]]:
    """A fresh clone of the committed files, or the one kept in work, and a shell in it."""
    clone, home, outputs, binaries = (work / name for name in ("gptray", "home", "outputs", "bin"))
    for folder in (home, outputs, binaries):
        folder.mkdir(parents=True, exist_ok=True)
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        write_files(clone)
    shell = Shell(clone, environment(home, binaries), outputs)
    try:
        if (clone / ".venv").exists():
            shell.run("source .venv/bin/activate", "activate")
        yield shell, clone
    finally:
        shell.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Type the commands of README and docs/.")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="commands to skip")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here; new or kept")
    names = [page.stem for page in pages(ROOT)]
    parser.add_argument("--pages", nargs="+", choices=names, default=names, help="and README once")
    parser.add_argument("--hub", action="store_true", help="take GPT-2 from the hub")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the terminal's commands end too
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    place = tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep)
    with place as folder, terminal(Path(folder).resolve()) as (shell, clone):
        is_new = not (clone / ".venv").exists()
        names = {"README", *args.pages} if is_new else args.pages
        chosen = [page for page in pages(clone) if page.stem in names]
        found = [command for page in chosen for command in commands(page)]
        todo = [one for one in found if not any(word in one.text for word in args.skip)]
        if is_new:
            made = PARQUET if args.hub else PARQUET + SMALL_MODELS
            todo.insert(1, Command("made", "bash", f".venv/bin/python - <<'END'{made}END"))
        for outcome in type_all(shell, todo):
            outcomes.append(outcome)
            print(outcome, flush=True)
    failed = [outcome.command.place for outcome in outcomes if outcome.reason]
    passed, seconds = len(outcomes) - len(failed), time.monotonic() - begin
    print(json.dumps({"passed": passed, "failed": failed, "seconds": round(seconds, 1)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
