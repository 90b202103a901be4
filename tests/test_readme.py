"""Commands of README and docs/: their keys hold; in the long tests they are typed as they stand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptray.cli import parse_arguments
from gptray.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def job_commands() -> list[str]:
    """What follows `python` in the pages' bash blocks where it is one of the jobs."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [found[1] for line in lines if (found := re.search(r"python (jobs/\w+\.py.*)", line))]


@pytest.mark.parametrize("command", job_commands())
def test_command_names_a_job_and_keys_that_there_are(command: str) -> None:
    job, *words = shlex.split(command, comments=True)
    assert (ROOT / job).is_file()
    arguments = parse_arguments(words)
    assert arguments.problems == []
    # A config that an earlier command writes, or the reader, is not there yet.
    shipped = str(arguments.config).startswith("configs/")
    load_config(f"{ROOT}/{arguments.config}" if shipped else None, arguments.overrides)


def test_every_block_of_yaml_is_a_config(tmp_path: Path) -> None:
    assert blocks("yaml")
    for block in blocks("yaml"):
        (tmp_path / "block.yaml").write_text(block, "utf-8")
        load_config(str(tmp_path / "block.yaml"), [])


def test_every_page_is_linked_from_readme_and_every_link_leads_somewhere() -> None:
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            if page == PAGES[0]:
                linked.add(ROOT / target)
    assert linked >= set(PAGES[1:])


def test_single_pages_are_typed_in_a_folder_that_was_kept(tmp_path: Path) -> None:
    clone = tmp_path / "gptray"
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "activate").write_text("IS_ACTIVE=yes\n", "utf-8")
    (clone / "docs").mkdir()
    (clone / "README.md").write_text("[runs](docs/runs.md) [cluster](docs/cluster.md)\n", "utf-8")
    (clone / "docs" / "runs.md").write_text("```bash\nfalse\n```\n", "utf-8")
    block = "```bash\ntest $IS_ACTIVE = yes\nexit-badly\nfalse # not typed\n```\n"
    (clone / "docs" / "cluster.md").write_text(block, "utf-8")
    script = str(ROOT / "benchmarks" / "readme.py")
    words = ["--keep", str(tmp_path), "--pages", "cluster", "--skip", "not typed"]
    done = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *outcomes, last = done.stdout.splitlines()
    assert [line.split()[0] for line in outcomes] == ["cluster.md:2", "cluster.md:3"]
    assert "exit-badly: command not found" in outcomes[1]
    result = json.loads(last)
    assert (result["passed"], result["failed"]) == (1, ["cluster.md:3"])


@pytest.mark.chaos
def test_commands_work_as_typed_in_a_fresh_clone() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
