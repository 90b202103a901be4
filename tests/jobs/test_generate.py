"""The generate job: every prompt exactly once, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from gptray.config import UserError, dump, load_config
from gptray.generation.settings import derived_seed
from gptray.model.hf import save_pretrained
from gptray.visible import visible
from tests.generation.models import needs_native, random_gpt, reference, small_tokenizer
from tests.jobs.generating import config_of, generate, planned

ROOT = Path(__file__).parents[2]
ROWS = 60


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(3)
    words = ["the", "cat", "sees", "a", "dog.", "\uc61b\ub0a0", "\U0001f984"]
    rows = [
        {
            "prompt": " ".join(rng.choices(words, k=rng.randint(1, 8))),
            "topic": f"t{i % 3}",
            "temperature": rng.choice([None, 0, 1.5]),
            "seed": i if i % 2 else None,
        }
        for i in range(ROWS)
    ]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, model_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An output that is whole, and what the job said of it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, generate(config_of(model_dir, prompts, output))


def rows_of(output: Path) -> list[dict[str, Any]]:
    tables = [parquet.read_table(path) for path in sorted(output.glob("*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def test_every_row_once_with_its_own_settings_and_columns(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path
) -> None:
    output, result = finished
    rows = rows_of(output)
    given = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [(row["prompt"], row["topic"]) for row in rows] == [
        (row["prompt"], row["topic"]) for row in given
    ]
    seeds = [derived_seed(0, i) if i % 2 == 0 else i for i in range(ROWS)]
    assert [row["seed"] for row in rows] == seeds
    assert {row["model"] for row in rows} == {str(model_dir)}
    assert result["rows"] == ROWS and result["errors"] == 0
    assert result["output_tokens"] == sum(row["output_tokens"] for row in rows)
    assert sum(result["finish_reasons"].values()) == ROWS
    assert (output / "_SUCCESS").is_file()
    assert json.loads((output / "_manifest.json").read_text())["rows"] == ROWS
    metadata = parquet.read_schema(output / "part-00000.parquet").metadata
    assert json.loads(metadata[b"gptray.settings"])["sample.max_new_tokens"] == 12


def test_pandas_pyarrow_and_ray_open_the_folder(finished: tuple[Path, dict[str, Any]]) -> None:
    import ray

    pandas = pytest.importorskip("pandas")
    output = finished[0]
    assert len(pandas.read_parquet(output)) == parquet.read_table(output).num_rows == ROWS
    assert ray.data.read_parquet(str(output)).count() == ROWS


def test_outputs_are_those_of_the_uncached_model(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path
) -> None:
    from gptray.data.tokenizer import Tokenizer
    from gptray.generation.settings import Sampling
    from gptray.model.hf import load_pretrained

    config = config_of(model_dir, prompts, finished[0])
    model, tokenizer = load_pretrained(model_dir).eval(), Tokenizer.load(model_dir)
    given = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row, source in list(zip(rows_of(finished[0]), given, strict=True))[::7]:
        own = {k: source[k] for k in ("temperature",) if source[k] is not None}
        sampling = Sampling.of(config.sample, **own, seed=row["seed"])
        expected = reference(model, tokenizer.encode(row["prompt"]), sampling, tokenizer.eos_id)
        assert row["output"] == tokenizer.decode(expected)
        assert row["output_tokens"] == len(expected)


def test_workers_batches_and_files_do_not_change_a_row(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    other = ["generate.num_workers=2", "generate.max_batch_size=17", "generate.rows_per_file=13"]
    generate(config_of(model_dir, prompts, tmp_path / "two", *other))
    assert rows_of(finished[0]) == rows_of(tmp_path / "two")


def test_rows_that_cannot_run_keep_their_place(
    ray_cluster: None, model_dir: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": "the cat"},
        {"id": "b", "text": None},
        {"id": "c", "text": ""},
        {"id": "d", "text": "dog " * 6400},
        {"id": "e", "text": "a dog", "top_k": -1},
        {"id": "f", "text": 7},
        {"id": "g", "text": "a cat", "max_new_tokens": 3, "min_new_tokens": 3},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id":"h","text":"\\ud800"}')
    column = "generate.prompt_column=text"
    result = generate(config_of(model_dir, path, tmp_path / "out", column))
    got = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert list(got) == list("abcdefgh")
    errors = {name: row["error"] for name, row in got.items() if row["error"]}
    expected = {"b": "null", "d": "too long", "e": "top_k", "f": "must be text"}
    for name, text in {**expected, "h": "surrogate"}.items():
        assert text in errors.pop(name)
        assert got[name]["output"] is None and got[name]["finish_reason"] == "error"
    assert errors == {} and result["errors"] == 5
    assert got["c"]["prompt_tokens"] == 1, "an empty prompt starts a fresh document"
    assert got["g"]["output_tokens"] == 3


def test_a_killed_engine_is_replaced(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    victims: list[int] = []

    class Killer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runs as process" in record.getMessage() and not victims:
                assert isinstance(record.args, tuple)
                victims.append(int(str(record.args[0])))
                os.kill(victims[0], signal.SIGKILL)

    logger, killer = logging.getLogger("gptray"), Killer()
    logger.addHandler(killer)
    logger.setLevel(logging.DEBUG)
    try:
        generate(config_of(model_dir, prompts, tmp_path / "out"))
    finally:
        logger.removeHandler(killer)
        logger.setLevel(logging.NOTSET)
    assert victims
    assert rows_of(tmp_path / "out") == rows_of(finished[0])
    assert not list((tmp_path / "out").glob(".part*"))


def test_a_killed_driver_goes_on_with_the_same_command(
    finished: tuple[Path, dict[str, Any]],
    joining: dict[str, str],
    model_dir: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    config = config_of(model_dir, prompts, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, str(ROOT / "jobs" / "generate.py"), "--config"]
    driver = subprocess.Popen(
        [*command, str(tmp_path / "config.yaml")],
        env=joining,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "out").glob("part-*.parquet")):
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert generate(config)["rows"] == ROWS
    assert rows_of(tmp_path / "out") == rows_of(finished[0])


def test_a_finished_output_is_left_alone_but_for_a_file_that_is_gone(
    ray_cluster: None, model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    config = config_of(model_dir, prompts, tmp_path / "out")
    generate(config)
    before = rows_of(tmp_path / "out")
    lost = tmp_path / "out" / "part-00003.parquet"
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*") if p != lost}
    assert generate(config)["rows"] == ROWS
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    lost.unlink()
    assert generate(config)["rows"] == ROWS
    parts = {p: stamp for p, stamp in stamps.items() if p.suffix == ".parquet"}
    assert parts == {path: path.stat().st_mtime_ns for path in parts}
    assert rows_of(tmp_path / "out") == before


def test_a_renamed_input_and_a_dry_run_change_nothing(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    renamed = Path(shutil.copy(prompts, tmp_path / "renamed.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in finished[0].iterdir()}
    config = config_of(model_dir, renamed, finished[0])
    assert generate(config)["rows"] == ROWS
    facts = dict(planned(config))
    assert facts["rows"] == str(ROWS) and facts["columns"].endswith("topic, temperature")
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].iterdir()}
    planned(config_of(model_dir, prompts, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_samples_are_counted_in_files_and_results(
    ray_cluster: None, model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = generate(config_of(model_dir, prompts, out, "generate.num_samples=3"))
    assert result["rows"] == 3 * ROWS == sum(result["finish_reasons"].values())
    files = sorted(out.glob("*.parquet"))
    assert len(files) == -(-ROWS // 8) and parquet.read_metadata(files[0]).num_rows == 3 * 8
    assert {row["sample"] for row in rows_of(out)} == {0, 1, 2}
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (manifest["rows"], manifest["num_samples"]) == (3 * ROWS, 3)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["sample.seed=9"], "sample.seed: 0 there, 9 now"),
        (["sample.top_k=3"], "sample.top_k: 40 there, 3 now"),
        (["generate.rows_per_file=9"], "generate.rows_per_file"),
        (["generate.num_samples=2"], "generate.num_samples: 1 there, 2 now"),
    ],
)
def test_other_settings_into_the_same_folder_are_refused(
    finished: tuple[Path, dict[str, Any]],
    model_dir: Path,
    prompts: Path,
    change: list[str],
    key: str,
) -> None:
    with pytest.raises(UserError, match=key):
        generate(config_of(model_dir, prompts, finished[0], *change))


@needs_native
def test_all_rows_come_from_one_backend_and_another_one_is_refused(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path
) -> None:
    identity = json.loads((finished[0] / "_manifest.json").read_text())["identity"]
    chosen = identity["generate.backend"]
    for part in finished[0].glob("part-*.parquet"):
        settings = json.loads(parquet.read_metadata(part).metadata[b"gptray.settings"])
        assert settings == identity and chosen in ("native", "torch")
    other = "torch" if chosen == "native" else "native"
    with pytest.raises(UserError, match=f"generate.backend: '{chosen}' there, '{other}' now"):
        generate(config_of(model_dir, prompts, finished[0], f"generate.backend={other}"))
    assert generate(config_of(model_dir, prompts, finished[0], f"generate.backend={chosen}"))


def test_another_model_or_input_and_a_foreign_folder_are_refused(
    finished: tuple[Path, dict[str, Any]], model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer, seed=1), tmp_path / "m", eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "m")
    with pytest.raises(UserError, match="generate.model"):
        generate(config_of(tmp_path / "m", prompts, finished[0]))
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="generate.input_path"):
        generate(config_of(model_dir, tmp_path / "q.jsonl", finished[0]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and was not written by this job"):
        generate(config_of(model_dir, prompts, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_model_with_damaged_weights_fails_the_job(
    ray_cluster: None, prompts: Path, tmp_path: Path
) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))  # type: ignore[operator]
    save_pretrained(model, tmp_path / "m", eos_token_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "m")
    with pytest.raises(UserError, match="ln_f.weight is not finite: the weights are damaged"):
        generate(config_of(tmp_path / "m", prompts, tmp_path / "out"))


def test_a_truncated_model_is_the_users_mistake(
    ray_cluster: None, model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model_dir, tmp_path / "m") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        generate(config_of(tmp_path / "m", prompts, tmp_path / "out"))


def test_prompts_on_the_terminal(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        None,
        [
            f"generate.model={model_dir}",
            "sample.prompt=[the cat, \uc61b\ub0a0]",
            "sample.max_new_tokens=9",
            "generate.precision=fp32",
        ],
    )
    result = generate(config)
    shown = "".join(f"{one['prompt']}{one['output']}\n" for one in result["outputs"])
    assert capsys.readouterr().out == visible(shown)
    assert result["rows"] == 2 and result["output_tokens"] <= 18
    with pytest.raises(UserError, match="too long"):
        generate(load_config(None, [f"generate.model={model_dir}", "sample.prompt=" + "x" * 999]))
