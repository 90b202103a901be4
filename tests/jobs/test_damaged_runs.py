"""Run folders that somebody or something damaged: resumed with the same bits, or refused by name.

What `jobs/train.py` does, with its loop in this process; no Ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptray.config import RunFailed, UserError
from gptray.data.request import make_request
from gptray.data.tokenizer import char_tokenizer
from gptray.jobs.folders.run_folder import run_dir
from gptray.training.checkpoint import newest_intact
from tests.damage import (
    DEEP,
    NO_JSON,
    Damage,
    assert_a_sentence,
    both,
    cut,
    fields,
    file_at,
    flipped,
    folder_at,
    gone,
    link_at,
    pipe_at,
    text,
)
from tests.data.prepared import prepared_here
from tests.jobs.interrupted import (
    EVENTS,
    MANIFEST,
    METRICS,
    MOMENTS,
    NEW,
    OLD,
    TRAINER,
    WEIGHTS,
    Killed,
    config_in,
    job,
    moments,
    not_finite,
    progress,
    signed,
    what_it_came_to,
)
from tests.tiny import tiny_text

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with prepared text and a run that was killed after step 4."""
    root = tmp_path_factory.mktemp("half")
    words = tiny_text(300)
    (root / "tiny.txt").write_text(words)
    storage = root / "storage"
    folder = make_request(config_in(storage)).data_dir
    folder.mkdir(parents=True)
    prepared_here(folder, char_tokenizer(words), train=words[:8000], val=words[8000:])
    with pytest.raises(Killed):
        job(config_in(storage), kill_at=4)
    return storage


@pytest.fixture(scope="module")
def whole(storage: Path) -> tuple[str, list[tuple[int, float]]]:
    """What the run comes to if nothing is damaged."""
    other = storage.parent / "whole"
    shutil.copytree(storage, other)
    job(config_in(other))
    return what_it_came_to(other / "r")


@pytest.fixture
def run(storage: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, beside what it must not touch."""
    shutil.copytree(storage, tmp_path / "storage", symlinks=True)
    shutil.copy(storage.parent / "tiny.txt", tmp_path / "tiny.txt")
    folder = tmp_path / "storage" / "r"
    written = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(written.replace(str(storage.parent), str(tmp_path)))
    (tmp_path / "precious").mkdir()
    for name in ("file", "model.safetensors"):
        (tmp_path / "precious" / name).write_text("precious")
    return folder


def precious(folder: Path) -> dict[str, str]:
    place = folder.parents[1] / "precious"
    return {path.name: path.read_text() for path in place.iterdir()}


def appended(name: str, line: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + line)


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def manifest(files: object, version: object = 1) -> Damage:
    return text(MANIFEST, json.dumps({"format": version, "files": files}))


ENTRY = {"size": 1, "sha256": "x"}
# Entries and values that no writer of these files ever made.
WRONG_FILES: list[object] = [
    [], {}, None, "x", 1, ["trainer.json"], {"trainer.json": 1}, {"trainer.json": {}},
    {"trainer.json": {"size": 1}}, {"trainer.json": {"size": "1", "sha256": 1}},
    {"a\0b": ENTRY}, {"\ud800": ENTRY}, {"../../../tiny.txt": ENTRY}, {"x" * 5000: ENTRY},
]  # fmt: skip
WRONG_FORMATS: list[object] = ["1", 2, None, []]
MANIFESTS: dict[str, Damage] = {
    **{f"manifest {name}": text(MANIFEST, raw) for name, raw in NO_JSON.items()},
    **{
        f"manifest files {files!r:.20}": manifest(files) for files in WRONG_FILES
    },
    **{f"manifest format {one!r}": manifest({}, one) for one in WRONG_FORMATS},
    "manifest nan": text(MANIFEST, '{"format": NaN, "files": {}}'),
    "manifest is gone": gone(MANIFEST),
    "manifest is a folder": folder_at(MANIFEST),
    "manifest is a pipe": pipe_at(MANIFEST),
    "manifest is a loop": link_at(MANIFEST, "manifest.json"),
    "manifest is endless": link_at(MANIFEST, "/dev/zero"),
}  # fmt: skip
STATES: dict[str, Damage] = {
    **{
        f"state step {step!r:.12}": signed(fields(TRAINER, step=step))
        for step in (10**30, -1, "4", 4.5, 2, None, ..., True)
    },
    **{
        f"state progress {key}={value!r:.12}": signed(progress(**{key: value}))
        for key, value in (("best_val_loss", float("nan")), ("bar", "x"), ("x", 1),
                           ("bad_evals", 10**9), ("bad_evals", -1), ("best_step", 10**9),
                           ("best_step", ...), ("best_step", 1.5))
    },
    "state progress list": signed(fields(TRAINER, progress=[])),
    "state without progress": signed(fields(TRAINER, progress=...)),
    "state data null": signed(fields(TRAINER, data=None)),
    **{f"state {name}": signed(text(TRAINER, raw)) for name, raw in NO_JSON.items()},
    "state cut": text(f"{NEW}/{TRAINER}", "{"),
    "state is gone": signed(gone(TRAINER)),
    "weights are gone": signed(gone(WEIGHTS)),
    "moments are gone": signed(gone(MOMENTS)),
}  # fmt: skip
FLIPS: dict[str, Damage] = {
    f"{name} bit at {tenth}0 %": flipped(f"{NEW}/{name}", tenth)
    for name in (WEIGHTS, MOMENTS, TRAINER, "config.yaml", "model/config.json",
                 "model/tokenizer.json")
    for tenth in (0, 3, 7, 10)
}  # fmt: skip
CHECKPOINTS: dict[str, Damage] = {
    "newest empty": folder_at(NEW),
    "newest is a file": file_at(NEW),
    "newest is a dead link": link_at(NEW, "nowhere"),
    "newest moved, a link in its place": lambda run: (
        (run / NEW).rename(run / "elsewhere"), link_at(NEW, "elsewhere")(run)
    ),
    "older moved, a link in its place": lambda run: (
        (run / OLD).rename(run / "elsewhere"), link_at(OLD, "elsewhere")(run)
    ),
    "an empty one of a later step": lambda run: (run / "checkpoint_999999999999").mkdir(),
    "a copy under a later step": lambda run: shutil.copytree(run / NEW, run / "checkpoint_000005"),
    "newest without its zeros": lambda run: (run / NEW).rename(run / "checkpoint_4"),
    "newest in other digits": lambda run: (run / NEW).rename(
        run / "checkpoint_\u0660\u0660\u0660\u0660\u0660\u0664"
    ),
    "a pickle in it": text(f"{NEW}/optimizer.pt", b"\x80\x04."),
    "one set aside before": both(folder_at(f"{NEW}.damaged-1"), text(f"{NEW}/{TRAINER}", "{")),
    "a draft that is a file": text(".checkpoint_000006.tmp", "x"),
    "a draft that is a link": link_at(".checkpoint_000006.tmp", "../../precious"),
    "an old one left": lambda run: shutil.copytree(run / OLD, run / ".checkpoint_000002.old"),
    "an old one that is a link": link_at(".checkpoint_000002.old", "../../precious"),
    "an old one that is a file": text(".checkpoint_000002.old", "x"),
}  # fmt: skip
BESIDE: dict[str, Damage] = {
    **{
        f"{EVENTS} {name}": damage
        for name, damage in {
            "torn": appended(EVENTS, b'{"event": "x", "ti'), "nuls": appended(EVENTS, b"\0" * 99),
            "nuls and a line": appended(EVENTS, b"\0" * 99 + b"\n"),
            "blank line": appended(EVENTS, b"\n"), "emptied": text(EVENTS, ""),
            "gone": gone(EVENTS), "CRLF": changed(EVENTS, lambda b: b.replace(b"\n", b"\r\n")),
            "doubled": changed(EVENTS, lambda b: b + b),
        }.items()
    },
    **{
        f"{METRICS} {name}": appended(METRICS, line)
        for name, line in {
            "torn": b'{"step": 5, "tra', "nuls": b"\0" * 99, "nuls and a line": b"\0" * 99 + b"\n",
            "blank line": b"\n",
        }.items()
    },
    "metrics CRLF": changed(METRICS, lambda b: b.replace(b"\n", b"\r\n")),
    "model is a file": file_at("model"),
    "model is gone": gone("model"),
    "model is empty": folder_at("model"),
    "a draft of the model is a file": lambda run: (
        gone("model")(run), text(".model.tmp", "x")(run)
    ),
    "a draft of the model is a link": lambda run: (
        gone("model")(run), link_at(".model.tmp", "../../precious")(run)
    ),
    "the report is a link": link_at("report.html", "../../precious/file"),
    "Ray's record is torn": text("checkpoint_manager_snapshot.json", "{"),
}  # fmt: skip
NOT_WHOLE = {**MANIFESTS, **STATES, **FLIPS}
RIGHT = {
    **CHECKPOINTS,
    **BESIDE,
    **{name: NOT_WHOLE[name] for name in ("manifest deep", "state step 2", "weights are gone")},
}

NO_ROW: dict[str, bytes] = {
    "garbage": b"garbage\n", "binary": b"\xff\xfe\x00\x80\n", "list": b"[1]\n", "object": b"{}\n",
    "deep": DEEP.encode() + b"\n", "nan": b'{"event": "x", "step": NaN, "train_loss": 1}\n',
    "huge": b'{"event": "x", "step": 1' + b"0" * 5000 + b"}\n",
}  # fmt: skip
LINKS = (".driver.lock", ".writer.lock", EVENTS, METRICS)
REFUSED: dict[str, tuple[Damage, str]] = {
    **{
        f"{name} {kind}": (appended(name, line), rf"{name}:\d+: the line is damaged: ")
        for name in (METRICS, EVENTS)
        for kind, line in NO_ROW.items()
    },
    **{
        f"{name} {kind}": (damage, message)
        for name in (METRICS, EVENTS)
        for kind, damage, message in (
            ("folder", folder_at(name), f"{name} cannot be read: it is not a regular file"),
            ("pipe", pipe_at(name), f"{name} cannot be read: it is not a regular file"),
            ("begin lost", changed(name, lambda b: b[40:]), rf"{name}:1: the line is damaged"),
            # Of events: from the time, however many digits it has, into the next name.
            ("middle lost", changed(name, lambda b: b[:30] + b[45:]), rf"{name}:1: the line is"),
        )
    },
    "metrics emptied": (text(METRICS, ""), "has lost the row of step 4"),
    "metrics gone": (gone(METRICS), "has lost the row of step 4"),
    "metrics doubled": (changed(METRICS, lambda b: b + b), "row of step 1 after that of step 4"),
    **{
        f"{name} is a link": (
            link_at(name, "../../precious/file"),
            f"{name} is a link to .*, and the run would write through it",
        )
        for name in LINKS
    },
    "model is a link": (link_at("model", "../../precious"), "model is a link to"),
    "tensorboard is a link": (link_at("tensorboard", "../../precious"), "tensorboard is a link"),
    "tensorboard is a file": (file_at("tensorboard"), "cannot write .*tensorboard.*: "),
    "config gone": (gone("config.yaml"), "is not a run"),
    "config empty": (text("config.yaml", ""), "was started with other settings"),
    "config binary": (text("config.yaml", b"\xff\x00"), "config.yaml:1: not UTF-8"),
    "config cut": (cut("config.yaml", 3), "config.yaml|other settings"),
    "config is a pipe": (pipe_at("config.yaml"), "not a run"),
    "config is a link": (link_at("config.yaml", "../../precious/file"), "config.yaml:1: expects"),
    "config with another rate": (
        changed("config.yaml", lambda b: b.replace(b"lr: 0.01", b"lr: 0.02")), "optim.lr: 0.02"
    ),
    "all checkpoints damaged": (
        lambda run: [text(f"{one}/{TRAINER}", "{")(run) for one in (NEW, OLD)], "is intact"
    ),
    "all checkpoints gone": (lambda run: [gone(one)(run) for one in (NEW, OLD)], "are gone"),
    "state of other data": (signed(fields(TRAINER, data="0" * 64)), "has changed since"),
    "moments not finite": (
        signed(moments(lambda t: {k: v * float("nan") for k, v in t.items()})), "hold the moments"
    ),
    "moments of nothing": (signed(moments(lambda t: {"x": torch.zeros(1)})), "hold the moments"),
    "a moment missing": (
        signed(moments(lambda t: dict([*t.items()][1:]))), "hold the moments of this model"
    ),
    "moments misshapen": (
        signed(moments(lambda t: {k: v.flatten()[:1].clone() for k, v in t.items()})), "moments"
    ),
    "moments empty": (signed(text(MOMENTS, b"")), "optimizer.safetensors is damaged"),
    "weights not finite": (signed(not_finite), "loss nan"),
}  # fmt: skip


@pytest.mark.parametrize("damage", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    run: Path, damage: Damage
) -> None:
    damage(run)
    folder, problems = newest_intact(run)
    assert folder == run / OLD
    assert len(problems) == 1 and problems[0].startswith(f"{NEW} is damaged: ")
    assert "\n" not in problems[0] and len(problems[0]) < 300


@pytest.mark.parametrize("damage", RIGHT.values(), ids=RIGHT)
def test_a_damaged_run_resumes_with_the_bits_of_an_undamaged_one(
    run: Path, whole: tuple[str, list[tuple[int, float]]], damage: Damage
) -> None:
    damage(run)
    before = precious(run)
    job(config_in(run.parent))
    assert what_it_came_to(run) == whole
    assert precious(run) == before


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_be_right_is_refused_in_a_sentence(
    run: Path, damage: Damage, message: str
) -> None:
    damage(run)
    before = precious(run)
    with pytest.raises((UserError, RunFailed), match=message) as told:
        job(config_in(run.parent))
    assert_a_sentence(told.value)
    assert precious(run) == before
    assert run_dir(config_in(run.parent)) == run
