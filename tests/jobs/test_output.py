"""The output folder of a generate job: what is checked before anything starts; no Ray here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from gptray.config import RunFailed, UserError, load_config
from gptray.jobs.cluster.tasks import result_of
from gptray.jobs.generate.checked import check_batch
from gptray.jobs.generate.output_plan import MANIFEST, new_plan
from gptray.jobs.generate.remote_output import output_kind
from gptray.jobs.generate.worker import EngineWorker, GenerateTask
from tests.jobs.generating import config_of, generate, planned


@pytest.fixture
def finished(model_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An input without rows and its output, which is whole."""
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text("")
    generate(config_of(model_dir, path, out))
    return path, out


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
def test_no_rows_are_a_whole_output_with_a_schema(
    model_dir: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "p.parquet":
        kinds = pa.schema([("prompt", pa.string()), ("when", pa.timestamp("ns"))])
        parquet.write_table(kinds.empty_table(), tmp_path / name)
    else:
        (tmp_path / name).write_text("prompt,when\n" if name == "p.csv" else "")
    out = tmp_path / "out"
    config = config_of(model_dir, tmp_path / name, out)
    with caplog.at_level(logging.INFO, logger="gptray"):
        assert generate(config)["rows"] == 0 and generate(config)["rows"] == 0
    assert "the input has no rows, so the output has only columns" in caplog.messages
    (part,) = out.glob("*.parquet")
    schema = parquet.read_schema(part)
    assert schema.names[:3] == ["id", "prompt", "output"]
    if name == "p.parquet":
        assert schema.field("when").type == pa.timestamp("ns")
    assert json.loads((out / "_manifest.json").read_text())["rows"] == 0
    assert (out / "_SUCCESS").is_file()


@pytest.mark.parametrize("entry", ["in", "in/*", "in/**/*.parquet", "in/p.jsonl"])
def test_an_output_among_the_input_is_refused(model_dir: Path, tmp_path: Path, entry: str) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for path in (tmp_path / "in", tmp_path / "in" / "deep"):
        (path / "p.jsonl").write_text('{"prompt": "x"}\n')
        parquet.write_table(pa.table({"prompt": ["x"]}), path / "p.parquet")
    inside = "in" if entry in ("in/p.jsonl", "in/*") else "in/out"
    for job in (generate, planned):
        with pytest.raises(UserError, match=r"generate.output_path: .*in.* choose another folder"):
            job(config_of(model_dir, tmp_path / entry, tmp_path / inside))
    config = config_of(model_dir, tmp_path / "in" / "p.jsonl", tmp_path / "in" / "out")
    assert dict(planned(config))["rows"] == "1", "beside a file is a place like any other"


def test_a_dry_run_refuses_what_the_job_refuses(model_dir: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    rows = [{"id": i, "prompt": "x"} for i in range(2000)]

    def refused(match: str, *overrides: str) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for job in (generate, planned):
            with pytest.raises(UserError, match=match):
                job(config_of(model_dir, path, out, *overrides))

    rows[1999]["id"] = 3
    refused("p.jsonl:2000: the id 3")
    rows[1999] = {"id": 4000, "prompt": "x", "output": 1}
    refused("columns of its own named 'output'")
    rows[1999].pop("output")
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    refused("file")
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused("was not written by this job")


def test_mistakes_are_told_together_without_ray(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            f"generate.model={tmp_path}",
            f"generate.input_path={tmp_path}/none.jsonl",
            "generate.output_path=hdfs://bucket/out",
        ],
    )
    with pytest.raises(UserError) as caught:
        planned(config)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].split("=")[0] for line in lines] == [
        "generate.model", "generate.input_path", "generate.output_path"
    ]  # fmt: skip
    with pytest.raises(UserError, match="has no run with a model"):
        planned(load_config(None, [f"storage_path={tmp_path}"]))


def test_duplicate_ids_and_broken_lines_stop_before_anything_is_made(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: the id 1 in column 'id' is also at"):
        generate(config_of(model_dir, path, tmp_path / "out"))
    path.write_text('{"id": 1, "prompt": "x"}\n{"id": 2,\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: not JSON"):
        generate(config_of(model_dir, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [b"", b'{"identity": {', b"[]", b"{}", b"\xff\x00", b"[" * 100_000, None]
)
def test_a_damaged_plan_is_one_sentence(
    finished: tuple[Path, Path], model_dir: Path, damage: bytes | None
) -> None:
    path, out = finished
    if damage is None:  # rows that the input has not
        plan = json.loads((out / "_manifest.json").read_text())
        damage = json.dumps({**plan, "rows": 10**12}).encode()
    (out / ".gptray" / "plan.json").write_bytes(damage)
    config = config_of(model_dir, path, out)
    assert generate(config)["rows"] == 0, "the manifest says the same"
    (out / "_manifest.json").write_bytes(damage)
    for job in (generate, planned):
        with pytest.raises(UserError, match=r"plan.json is damaged or was not written") as told:
            job(config)
        assert "\n" not in str(told.value)


def test_an_input_is_its_content_whatever_its_name(
    finished: tuple[Path, Path], model_dir: Path, tmp_path: Path
) -> None:
    path, out = finished
    assert generate(config_of(model_dir, path.rename(tmp_path / "q.jsonl"), out))["rows"] == 0
    (tmp_path / "q.csv").write_text("prompt\n")
    with pytest.raises(UserError, match="generate.input_path: 'sha256"):
        generate(config_of(model_dir, tmp_path / "q.csv", out))


def test_a_damaged_part_is_named(finished: tuple[Path, Path], model_dir: Path) -> None:
    path, out = finished
    (out / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunFailed, match=r"part-00000.parquet is damaged: .*delete it"):
        generate(config_of(model_dir, path, out))


def test_what_reads_a_parquet_folder_reads_the_output_and_no_file_beside_it(
    finished: tuple[Path, Path], model_dir: Path
) -> None:
    _, out = finished
    pandas = pytest.importorskip("pandas")
    names = parquet.read_schema(out / "part-00000.parquet").names
    for writing in (False, True):
        if writing:  # as an unfinished job leaves the folder
            (out / "_SUCCESS").unlink()
            (out / "_manifest.json").unlink()
            parquet.write_table(pa.table({"x": [1]}), out / ".gptray" / "part-00001.staged")
            (out / ".part-00001.parquet.ab12.partial").write_bytes(b"PAR1")
        assert parquet.read_table(out).column_names == names
        assert list(pandas.read_parquet(out).columns) == names


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("link", "link is a broken link"),
        ("file/out", "file is not a folder"),
        ("/proc/out", "/proc/out cannot be written"),
        ("~nobody-of-this-name/out", "no home folder is known"),
    ],
)
def test_a_place_that_takes_no_output_is_refused(
    model_dir: Path, tmp_path: Path, place: str, told: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    out = Path(place) if place.startswith("~") else tmp_path / place
    for job in (generate, planned):
        with pytest.raises(UserError, match=told):
            job(config_of(model_dir, tmp_path / "p.jsonl", out))


def test_memory_that_ends_while_an_engine_runs_names_the_key_to_lower(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "the cat"}\n')
    config = config_of(model_dir, path, out, "generate.backend=torch")
    checked = check_batch(config)
    with output_kind(checked).opened(checked) as output:
        task = GenerateTask(config, 1, str(model_dir), "m", str(out), output.metadata())
        engine = EngineWorker(task)
        assert result_of(engine.feed(0, output.handed(0))) == []

        def ended(*given: object, **named: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0.")

        monkeypatch.setattr(torch, "softmax", ended)
        with pytest.raises(
            RunFailed, match=r"lower generate\.max_batch_size from 6, such as .*=3$"
        ):
            result_of(engine.finish())


def test_an_output_from_before_a_setting_existed_is_the_same_jobs_by_default(
    finished: tuple[Path, Path], model_dir: Path
) -> None:
    path, out = finished
    manifest = json.loads((out / MANIFEST).read_text())
    for key in ("sample.stop_token_ids", "sample.include_stop_str_in_output"):
        del manifest["identity"][key]
    older = new_plan(manifest["identity"], manifest["model"], 0)
    (out / MANIFEST).write_text(json.dumps(manifest | older))
    assert generate(config_of(model_dir, path, out))["rows"] == 0
    other = config_of(model_dir, path, out, "sample.stop_token_ids=[5]")
    with pytest.raises(UserError, match=r"sample.stop_token_ids: null there, \[5\] now"):
        generate(other)


def test_a_stop_token_that_the_model_lacks_is_told_before_anything_starts(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "the cat"}\n')
    stop = "sample.stop_token_ids=[5, 99999]"
    of_file = config_of(model_dir, path, tmp_path / "out", stop)
    in_terminal = load_config(None, [f"generate.model={model_dir}", "sample.prompt=the", stop])
    for config in (of_file, in_terminal):
        with pytest.raises(UserError, match="sample.stop_token_ids: 99999 is outside the vocabul"):
            planned(config)
    assert not (tmp_path / "out").exists()
