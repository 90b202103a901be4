"""The shared command line: exit codes, what goes to stdout and stderr, and flags mistyped."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptray.cli import run_job
from gptray.config import Config, RunFailed, UserError, load_config
from gptray.config.keys import field_specs
from gptray.jobs.base import Job, Plan

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[Config], dict[str, Any]]


def steps(config: Config) -> dict[str, Any]:
    return {"steps": config.train.max_steps, "name": config.name, "text": "\ud55c\uae00"}


def rows(config: Config) -> list[tuple[str, str]]:
    return [("tokens per step", f"{config.tokens_per_step:,}"), ("run folder", "~/gptray/a")]


def run(*argv: str, job: Run = steps, plan: Callable[[Config], Plan] = rows) -> int:
    tried = Job(check=lambda config: config, plan=plan, run=job)
    return run_job("train", doc="Train a GPT on text.", argv=argv, job=tried)


def raising(error: BaseException) -> Run:
    def job(config: Config) -> dict[str, Any]:
        raise error

    return job


def test_a_package_that_is_missing_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent(config: Config) -> dict[str, Any]:
        importlib.import_module("no_such_package")
        return {}

    assert run(job=absent) == 2
    said = f"train: {sys.prefix} lacks the package no_such_package; install gptray there again "
    assert capsys.readouterr().err.startswith(said)


def test_a_module_of_our_own_that_is_missing_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: Config) -> dict[str, Any]:
        importlib.import_module("gptray.no_such_module")
        return {}

    assert run(job=broken) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_result_is_one_json_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train.max_steps=7", "name=a") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"steps": 7, "name": "a", "text": "\ud55c\uae00"}
    assert out.count("\n") == 1
    assert err == ""


def test_config_file_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {max_steps: 9}\n")
    assert run("--config", str(path)) == 0
    assert run(f"--config={path}", "name=b") == 0
    assert [json.loads(line)["steps"] for line in capsys.readouterr().out.splitlines()] == [9, 9]


def test_dry_run_prints_a_config_file_and_a_plan_without_running(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--dry-run", "optim.lr=3e-4", job=raising(AssertionError("ran"))) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    path = tmp_path / "resolved.yaml"
    path.write_text("\n".join(lines))
    assert load_config(str(path), []) == load_config(None, ["optim.lr=3e-4"])
    assert lines == [
        "# tokens per step  2,048",
        "# run folder       ~/gptray/a",
        "optim:",
        "  lr: 0.0003",
        f"# {len(field_specs(Config)) - 1} of {len(field_specs(Config))} keys have their defaults "
        "(--help lists them)",
    ]
    plan = {"tokens per step": "2,048", "run folder": "~/gptray/a"}
    assert json.loads(last) == {"dry_run": True, "plan": plan}


def test_a_plan_folds_to_the_terminal_and_stays_a_config_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def long(config: Config) -> list[tuple[str, str]]:
        return [("files", "report.html " * 20), ("path", "/" + "a" * 90)]

    monkeypatch.setenv("COLUMNS", "60")
    assert run("--dry-run", "name=a", plan=long) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "aaa" not in line) <= 60
    assert f"/{'a' * 90}" in "".join(lines), "a path is not cut"
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    assert load_config(str(tmp_path / "a.yaml"), []) == load_config(None, ["name=a"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.txt: no such file"), 2, "train: a.txt: no such file\n"),
        (RunFailed("the loss is not finite"), 1, "train: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "train: interrupted\n"),
        (SystemExit(1), 130, "train: interrupted\n"),
    ],
)
def test_expected_end_is_a_message_and_its_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    assert run(job=raising(error)) == code
    assert capsys.readouterr() == ("", message)


def test_bug_is_a_traceback_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job=raising(ValueError("bug"))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback") and err.endswith("ValueError: bug\n")


def test_result_that_is_not_json_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job=lambda config: {"loss": float("nan")}) == 1
    assert capsys.readouterr().out == ""


def test_all_mistakes_show_at_once_before_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dryrun", "--lr", "3", "--config", "gone.yaml", "optim.lrr=1", "train.max_steps=x"]
    assert run(*argv, job=raising(AssertionError("ran"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *problems, hint = err.splitlines()
    assert [problem.partition(";")[0] for problem in problems] == [
        "command line: unknown option --dryrun",
        "command line: unknown option --lr",
        "gone.yaml: no such file",
        "command line: unknown key optim.lrr",
        "command line: train.max_steps: expects a whole number, got 'x'",
    ]
    assert "--help" in hint


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dryrun"], "did you mean --dry-run?"),
        (["--confg", "a.yaml"], "did you mean --config?"),
        (["-v"], "options are --config"),
        (["--verbos"], "did you mean --verbose?"),
        (["--optim.lr", "3"], "write optim.lr=3"),
        (["--optim.lr=3"], "write optim.lr=3"),
        (["--learning-rate=3"], "write optim.lr=3"),
        (["--lr", "3"], "write optim.lr=3"),
        (["--gpus", "2"], "write compute.num_workers=2"),
        (["--config"], "--config needs a file"),
        (["--config="], "--config needs a file"),
        (["--config", "--dry-run"], "--config needs a file"),
        (["--config", "configs/a", "--config", "b"], "--config is given twice"),
        (["--dry-run=true"], "--dry-run takes no value"),
        (["configs/a.yaml"], "did you mean --config configs/a.yaml?"),
    ],
)
def test_wrong_flag_shows_the_right_form(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert run(*argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80", "120", "300"])
def test_help_lists_every_key_within_the_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("--help", "no.such=key") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines()) <= min(max(int(columns), 80), 120)
    assert "\033" not in out
    shown = {match[1]: match[2] for match in re.finditer(r"^  ([a-z0-9_.]+)=(.*)", out, re.M)}
    words = " ".join(out.split())
    for key, spec in field_specs(Config).items():
        assert key in shown
        assert spec.description and f"({spec.type_words}) {spec.description}" in words
    assert shown["optim.lr"].startswith("0.002 ")
    for word in ("--config", "--dry-run", "--verbose", "Train a GPT on text."):
        assert word in out


def test_messages_of_the_job_are_short_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: Config) -> dict[str, Any]:
        logger = logging.getLogger("gptray.training")
        logger.info("step %d", 10)
        logger.debug("detail")
        logger.warning("slow")
        return {}

    assert run(job=job) == 0
    assert capsys.readouterr() == ("{}\n", "step 10\nwarning: slow\n")
    assert run("--verbose", job=job) == 0
    assert capsys.readouterr().err == "step 10\ndetail\nwarning: slow\n"


def test_sigterm_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def job(config: Config) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 10)
        return {}

    assert run(job=job) == 130
    assert capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_is_said_on_a_full_standard_error_that_does_not_block() -> None:
    code = (
        "import sys; from gptray.process_setup import set_up_process; set_up_process(); "
        "print('x' * 500_000, file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=writer)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    assert process.wait(60) == 0
    assert said == b"x" * 500_000 + b"\n"


def test_reader_that_stopped_is_no_error() -> None:
    code = (
        "from gptray.cli import run_job\n"
        "from gptray.jobs.base import Job\n"
        "job = Job(lambda config: config, lambda config: [], dict)\n"
        "run_job('a', doc='b', argv=['--dry-run'], job=job)"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parent.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file"),
            1,
            r"train: cannot write /disk/file: No space left on device \([\d,]+ bytes free\); the "
            "same command resumes once there is room\n",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "/disk/file"),
            1,
            r"train: cannot write /disk/file: Read-only file system .*once it can be written\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "n" * 300),
            2,
            "train: File name too long: n{60}...; choose a shorter one\n",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/a"),
            2,
            "train: /root/a: Permission denied\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),  # from os.getcwd
            2,
            "train: the current folder no longer exists; change to another one\n",
        ),
    ],
)
def test_storage_that_fails_anywhere_is_one_sentence(
    capsys: pytest.CaptureFixture[str], error: OSError, code: int, said: str
) -> None:
    assert run(job=raising(error)) == code
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize(("stream", "code"), [("stdout", 1), ("stderr", 2)])
def test_output_to_a_full_disk_ends_in_the_exit_code(
    tmp_path: Path, stream: str, code: int
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--dry-run"]
    command += [f"storage_path={tmp_path}", "optim.lr=1" if code == 1 else "optim.lrr=1"]
    with Path("/dev/full").open("wb") as full:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(command, **{**streams, stream: full}, check=False, timeout=120)
    assert done.returncode == code
    if code == 1:
        assert done.stderr == b"train: cannot write to standard output: No space left on device\n"


def a_list_of_runs(tmp_path: Path, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    (tmp_path / "run").mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "jobs" / "runs.py"), f"storage_path={tmp_path}"]
    return subprocess.run(command, **streams, stderr=subprocess.PIPE, check=False, timeout=120)


def test_a_table_for_a_full_disk_or_for_nobody_names_standard_output(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = a_list_of_runs(tmp_path, stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        b"runs: cannot write to standard output: No space left on device\n",
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = a_list_of_runs(tmp_path, stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_pipe_that_broke_inside_a_job_is_its_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job=raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize("descriptor", [1, 2])
@pytest.mark.parametrize("locale", ["C.UTF-8", "POSIX"])
def test_closed_output_is_no_error(tmp_path: Path, descriptor: int, locale: str) -> None:
    words = [str(ROOT / "jobs" / "train.py"), "--dry-run", f"storage_path={tmp_path}"]
    closed = 'exec "$@" ' + f"{descriptor}>&-"
    done = subprocess.run(
        ["sh", "-c", closed, "sh", sys.executable, *words],
        env={**os.environ, "LC_ALL": locale},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (done.stdout == b"") == (descriptor == 1)


BAR = """
import sys
from gptray.cli import run_job
from gptray.jobs.base import Job
from gptray.jobs.progress.bar import Bar

def job(config):
    print("begun", flush=True)
    bar = Bar("counting", 2)
    sys.stdin.readline()
    bar.show("counting", 1, "", eta="", line=None)
    bar.close()
    return {"counted": 2}

tried = Job(check=lambda config: config, plan=lambda config: [], run=job)
sys.exit(run_job("tried", doc="", job=tried))
"""


def test_a_job_goes_on_when_its_terminal_is_gone() -> None:
    terminal, stderr = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", BAR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        os.close(stderr)
        assert process.stdout and process.stdout.readline() == "begun\n"
        os.close(terminal)
        deadline = threading.Timer(60, process.kill)
        deadline.start()
        out, _ = process.communicate("\n")
        deadline.cancel()
    assert (process.returncode, out) == (0, '{"counted": 2}\n')


HOSTILE = "a\x1b[2J\x9b31m\u202eb\r"


def test_terminal_escapes_in_what_is_said_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def job(config: Config) -> dict[str, Any]:
        logging.getLogger("gptray").warning("file %s\tis\nodd", HOSTILE)
        raise UserError(f"{HOSTILE}: no such file")

    assert run(job=job) == 2
    out, err = capsys.readouterr()
    shown = r"a\x1b[2J\x9b31m\u202eb\x0d"
    assert err == f"warning: file {shown}\tis\nodd\ntrain: {shown}: no such file\n"
    assert out == ""


def test_terminal_escapes_in_a_result_stay_what_they_are_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(job=lambda config: {"output": HOSTILE}) == 0
    line = capsys.readouterr().out
    assert line.rstrip("\n").isprintable() and json.loads(line) == {"output": HOSTILE}


def test_a_traceback_and_a_plan_show_escapes_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job=raising(KeyError(HOSTILE)), plan=lambda config: []) == 1
    assert run("--dry-run", plan=lambda config: [("model", HOSTILE)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and r"# model  a\x1b[2J" in out
