"""Output folders of generate jobs, damaged between two starts; the engine is here, no Ray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.config import Config, RunFailed, UserError, load_config
from gptray.data.parts import part_name
from gptray.generation.batch import PartWriter
from gptray.generation.loading import open_engine
from gptray.jobs.generate.checked import check_batch
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.output_plan import MANIFEST
from tests.damage import (
    NO_JSON,
    Damage,
    assert_a_sentence,
    both,
    cut,
    fields,
    flipped,
    folder_at,
    gone,
    link_at,
    pipe_at,
    text,
)
from tests.jobs.generating import config_of

pytestmark = pytest.mark.usefixtures("in_time")

ROWS, PLAN, PARTS = 25, ".gptray/plan.json", [part_name(number) for number in range(4)]
FIRST = PARTS[0]
Feed = Callable[[Output, int], None]


@pytest.fixture(scope="module")
def feed(model_dir: Path) -> Feed:
    """Has one part of an output written, as an engine's process does."""
    config = load_config(None, ["generate.precision=fp32", "generate.backend=torch"])
    engine, tokenizer = open_engine(model_dir, config, max_batch_size=8)

    def feed(output: Output, number: int) -> None:
        sample, metadata = output.job.config.sample, output.metadata()
        writer = PartWriter(
            engine, tokenizer, sample, output.folder, num_samples=1, model="m", metadata=metadata
        )
        writer.feed(number, output.staged(number))
        writer.finish()

    return feed


def config_for(folder: Path, model_dir: Path, *overrides: str) -> Config:
    return config_of(
        model_dir, folder / "in.jsonl", folder / "out", "sample.max_new_tokens=2",
        "generate.backend=torch", *overrides,
    )  # fmt: skip


def job(config: Config, feed: Feed, *, most: int | None = None) -> dict[str, Any] | None:
    """Start or resume a job; None if it was ended after `most` parts."""
    with Output.opened(check_batch(config)) as output:
        missing = output.missing_parts()
        for number in missing[:most]:
            feed(output, number)
        return output.finish() if most is None else None


@pytest.fixture(scope="module")
def half(feed: Feed, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input and an output that has one of its four parts."""
    folder = tmp_path_factory.mktemp("half")
    lines = [json.dumps({"id": number, "prompt": f"the cat {number}"}) for number in range(ROWS)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    job(config_for(folder, model_dir), feed, most=1)
    return folder


@pytest.fixture(scope="module")
def whole(half: Path, feed: Feed, model_dir: Path) -> dict[str, str]:
    """What the output comes to if nothing is damaged."""
    folder = half.parent / "undamaged"
    shutil.copytree(half, folder)
    job(config_for(folder, model_dir), feed)
    return digests(folder / "out")


@pytest.fixture
def out(half: Path, tmp_path: Path) -> Path:
    shutil.copytree(half, tmp_path / "copy")
    (tmp_path / "copy" / "precious").write_text("precious")
    return tmp_path / "copy" / "out"


def digests(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.glob("part-*.parquet")
    }


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Put another whole Parquet file into the place of the part that is there."""
    return lambda out: parquet.write_table(change(parquet.read_table(out / FIRST)), out / FIRST)


def staged(damage: Callable[[str], Damage]) -> Damage:
    """Damage the staged input of the second part."""

    def of(out: Path) -> None:
        (path,) = (
            path for path in (out / ".gptray").glob("part-00001.*") if path.suffix != ".sha256"
        )
        damage(f".gptray/{path.name}")(out)

    return of


def linked(name: str) -> Damage:
    return link_at(name, "../precious" if "/" not in name else "../../precious")


RIGHT: dict[str, Damage] = {
    "nothing": lambda out: None,
    **{f"staged part cut to {n}0 %": staged(partial(cut, tenth=n)) for n in (0, 2, 5, 9)},
    **{f"staged bit at {n}0 %": staged(partial(flipped, tenth=n)) for n in (0, 2, 3, 5, 8, 10)},
    "staged part gone": staged(gone),
    "staged part a pipe": staged(pipe_at),
    "staged part a dead link": staged(partial(link_at, target="nowhere")),
    "written part gone": gone(FIRST),
    "_SUCCESS too early": text("_SUCCESS", ""),
    "a file of somebody's": text("notes.txt", "x"),
    "drafts left": both(text(f".{FIRST}.0.partial", "x"), text(f".{PARTS[2]}.1.partial", "x")),
    "a draft is a link": linked(f".{PARTS[2]}.0.partial"),
    "input touched": lambda out: os.utime(out.parent / "in.jsonl"),
}
NOT_OURS = "was not written by this job"
REFUSED: dict[str, tuple[Damage, str]] = {
    **{f"plan {name}": (text(PLAN, raw), "plan.json is damaged") for name, raw in NO_JSON.items()},
    **{
        f"plan {key}={value!r:.12}": (fields(PLAN, **{key: value}), "plan.json is damaged")
        for key, value in (("rows", 10**12), ("rows", 5), ("rows", -1), ("rows", "25"),
                           ("rows_per_file", 0), ("identity", None), ("num_samples", 2),
                           ("fingerprint", "x"), ("fingerprint", ...))
    },
    "plan gone": (gone(PLAN), "was not written by this job"),
    "plan a folder": (folder_at(PLAN), "was not written by this job"),
    "scratch gone": (gone(".gptray"), "was not written by this job"),
    **{f"part cut to {n}0 %": (cut(FIRST, n), f"{FIRST} is damaged") for n in (0, 3, 6, 9)},
    **{f"part bit at {n}0 %": (flipped(FIRST, n), "its sha256") for n in (0, 2, 4, 6, 8, 10)},
    "part with other ids": (
        rewritten(lambda t: t.set_column(0, "id", pa.array(range(100, 108)))), "its sha256"
    ),
    "part with fewer rows": (rewritten(lambda t: t.slice(0, 3)), "its sha256"),
    "part with other text": (
        rewritten(lambda t: t.set_column(2, "output", pa.array(["x"] * len(t)))), "its sha256"
    ),
    "part of another job": (
        rewritten(lambda t: t.replace_schema_metadata({"gptray.fingerprint": "x"})), "its sha256"
    ),
    "part of nobody's": (
        lambda out: shutil.copy(out / FIRST, out / PARTS[2]), "was not written by this job"
    ),
    "part's digest gone": (gone(".gptray/output-part-00000.sha256"), "was not written by this job"),
    "part a folder": (folder_at(FIRST), NOT_OURS),
    "part a pipe": (pipe_at(FIRST), NOT_OURS),
    "part a dead link": (link_at(FIRST, "nowhere"), NOT_OURS),
    "part a link": (linked(PARTS[2]), "was not written by this job"),
    "part beyond the last": (lambda out: shutil.copy(out / FIRST, out / part_name(99)), NOT_OURS),
    **{
        f"{name} a link": (linked(name), "is a link to .*, and the job would write through it")
        for name in (".gptray/.driver.lock", "_SUCCESS", MANIFEST)
    },
    "scratch a link": (
        lambda out: ((out / ".gptray").rename(out.parent / "s"), link_at(".gptray", "../s")(out)),
        "is a link to",
    ),
    "input with a row more": (
        lambda out: text("in.jsonl", '{"id": 0, "prompt": "x"}')(out.parent),
        "generate.input_path: 'sha256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", RIGHT.values(), ids=RIGHT)
def test_a_damaged_output_becomes_the_undamaged_one(
    out: Path, feed: Feed, model_dir: Path, whole: dict[str, str], damage: Damage
) -> None:
    damage(out)
    summary = job(config_for(out.parent, model_dir), feed)
    assert summary and summary["rows"] == ROWS
    assert digests(out) == whole
    assert (out.parent / "precious").read_text() == "precious"
    assert (out / "_SUCCESS").is_file()


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_an_output_that_cannot_be_right_is_refused_in_a_sentence(
    out: Path, feed: Feed, model_dir: Path, damage: Damage, message: str
) -> None:
    damage(out)
    with pytest.raises((UserError, RunFailed), match=message) as told:
        job(config_for(out.parent, model_dir), feed)
    assert_a_sentence(told.value)
    assert (out.parent / "precious").read_text() == "precious"
    assert (out / "_SUCCESS").is_symlink() or not (out / "_SUCCESS").is_file()


def test_a_bit_that_turns_in_a_finished_output_is_told(
    half: Path, feed: Feed, model_dir: Path, out: Path, whole: dict[str, str]
) -> None:
    config = config_for(out.parent, model_dir)
    job(config, feed)
    files = json.loads((out / MANIFEST).read_text())["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == whole
    flipped(PARTS[3], 5)(out)
    with pytest.raises(RunFailed, match=f"{PARTS[3]} is damaged: its sha256 has changed"):
        job(config, feed)
