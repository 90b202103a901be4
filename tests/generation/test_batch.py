"""Parts of a batch through one engine, without Ray: seeds, samples, columns, OpenAI's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling, derived_seed
from tests.data.parquet_kinds import KINDS
from tests.generation.batches import Batch, jsonl
from tests.generation.models import random_gpt, small_tokenizer


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = small_tokenizer()
    return Engine(random_gpt(tokenizer), tokenizer, max_batch_size=64)


@pytest.fixture
def batch(engine: Engine, tmp_path: Path) -> Batch:
    return Batch(engine, small_tokenizer(), tmp_path)


def test_copies_of_a_prompt_are_independent_draws(batch: Batch, tmp_path: Path) -> None:
    table = batch(
        jsonl(tmp_path, *[{"prompt": "the cat"}] * 300), "sample.temperature=1", "sample.top_k=null"
    )
    assert len(set(table["output"].to_pylist())) >= 290
    assert len(set(table["seed"].to_pylist())) == 300


def test_a_column_says_whether_a_row_may_break_characters(batch: Batch, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "utf8": value} for value in (True, False, None, "false") * 30]
    words = ("sample.temperature=1", "sample.top_k=null")
    table = batch(jsonl(tmp_path, *rows), *words)
    broken = ["\ufffd" in output for output in table["output"].to_pylist()]
    assert not any(broken[0::4]) and not any(broken[2::4])
    assert any(broken[1::4]) and any(broken[3::4])
    assert any(
        "\ufffd" in text
        for text in batch(jsonl(tmp_path, *rows[2::4]), *words, "sample.utf8=false")[
            "output"
        ].to_pylist()
    )


def test_any_row_is_made_again_alone_from_its_seed(batch: Batch, tmp_path: Path) -> None:
    rows = [
        {"id": f"r{i}", "prompt": f"a dog {i}", "seed": i if i == 3 else None} for i in range(9)
    ]
    words = ("sample.temperature=1", "sample.seed=5", "generate.num_samples=3")
    table = batch(jsonl(tmp_path, *rows), *words)
    assert table.num_rows == 27
    for row in table.to_pylist():
        assert row["output"] == batch.alone(row["prompt"], row["seed"], *words[:2])
        first = 3 if row["id"] == "r3" else derived_seed(5, row["id"])
        assert row["seed"] == (derived_seed(first, row["sample"]) if row["sample"] else first)


def test_the_same_file_in_another_order_gives_the_same_texts(batch: Batch, tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"the dog {i % 5}"} for i in range(40)]
    texts: list[dict[object, object]] = []
    for order in (rows, rows[::-1]):
        table = batch(jsonl(tmp_path, *order), f"generate.rows_per_file={7 + len(texts)}")
        texts.append(dict(zip(table["id"].to_pylist(), table["output"].to_pylist(), strict=True)))
    assert texts[0] == texts[1]


def test_samples_of_a_row_stand_together_and_the_first_is_the_rows_own(
    batch: Batch, tmp_path: Path
) -> None:
    path = jsonl(tmp_path, *({"prompt": f"cat {i}", "sample_of": i} for i in range(5)))
    one = batch(path, "generate.rows_per_file=2")
    assert "sample" not in one.column_names
    three = batch(path, "generate.rows_per_file=2", "generate.num_samples=3")
    assert three["id"].to_pylist() == [i for i in range(5) for _ in range(3)]
    assert three["sample"].to_pylist() == [0, 1, 2] * 5
    assert three["sample_of"].to_pylist() == three["id"].to_pylist()
    first = three.filter(pa.compute.equal(three["sample"], 0)).drop_columns("sample")
    assert first.equals(one)
    assert batch.progress.rows == 15 and batch.progress.errors == 0


def test_every_kind_of_column_arrives_beside_several_samples(batch: Batch, tmp_path: Path) -> None:
    columns = {"prompt": pa.array(["one", None, "three"]), **KINDS}
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    before = parquet.ParquetFile(tmp_path / "p.parquet").read()
    after = batch(tmp_path / "p.parquet", "generate.num_samples=2", "sample.max_new_tokens=1")
    assert after.column_names[:4] == ["id", "sample", "prompt", "output"]
    assert after["finish_reason"].to_pylist()[2:4] == ["error", "error"]
    for name in KINDS:
        assert after.schema.field(name).equals(before.schema.field(name), check_metadata=True)
        for row in range(3) if name != "odd floats" else (1, 2):
            given = before[name].slice(row, 1).combine_chunks()
            for sample in (0, 1):
                assert after[name].slice(2 * row + sample, 1).combine_chunks().equals(given), name
    assert after.schema.metadata[b"mine"] == b"1"


def test_a_seed_stands_in_the_output_of_a_row_that_cannot_run(batch: Batch, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": None, "seed": 5},
        {"id": "b", "prompt": "x", "seed": 2**63},
        {"id": "c", "prompt": "x " * 500},
    ]
    table = batch(jsonl(tmp_path, *rows))
    assert table["seed"].to_pylist() == [5, None, derived_seed(0, "c")]
    errors = table["error"].to_pylist()
    assert "null" in errors[0] and f"seed={2**63}" in errors[1] and "too long" in errors[2]
    assert table["output"].null_count == 3
    assert batch.progress.rows == batch.progress.errors == 3
    negative = batch(jsonl(tmp_path, {"prompt": "x", "seed": -5}))
    assert negative["seed"].to_pylist() == [-5] and "seed=-5" in negative["error"][0].as_py()


def test_prompts_may_be_empty_and_name_the_end_of_text(batch: Batch, tmp_path: Path) -> None:
    eos, tokens = batch.tokenizer.eos_token, batch.tokenizer.encode
    path = jsonl(tmp_path, *({"prompt": text} for text in ("", eos, f"the{eos}cat")))
    plain = batch(path)
    assert plain["error"].null_count == 3 and plain["prompt_tokens"][0].as_py() == 1
    assert plain["prompt_tokens"][1].as_py() > 1
    special = batch(path, "sample.parse_special=true")
    counts = [1, 1, len(tokens("the")) + 1 + len(tokens("cat"))]
    assert special["prompt_tokens"].to_pylist() == counts
    assert special["prompt"].to_pylist() == plain["prompt"].to_pylist()


def test_token_ids_are_prompts_in_every_kind_of_file(batch: Batch, tmp_path: Path) -> None:
    texts, tokenizer = ["the cat", "a dog sees", "the"], small_tokenizer()
    rows = [{"prompt": text} for text in texts]
    of_ids = [{"prompt": tokenizer.encode(text)} for text in texts]
    expected = batch(jsonl(tmp_path, *rows))
    own = ["output", "prompt_tokens", "seed", "error"]
    told = batch(jsonl(tmp_path, *of_ids))
    assert told.select(own).equals(expected.select(own))
    assert told["prompt"].to_pylist() == [str(row["prompt"]) for row in of_ids]
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.uint16())):
        column = pa.array([row["prompt"] for row in of_ids] + [None, []], kind)
        parquet.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
        stored = batch(tmp_path / "p.parquet")
        assert stored.slice(0, 3).select(own).equals(expected.select(own))
        assert stored["error"].to_pylist()[3:] == ["the prompt is null", "the prompt is empty"]
        assert stored["prompt"].type == kind
        assert stored["prompt"].to_pylist() == column.to_pylist()


def test_a_column_names_the_tokens_that_end_its_row(batch: Batch, tmp_path: Path) -> None:
    (whole,) = batch.engine.run(
        [Sequence(batch.tokenizer.encode("the cat"), Sampling(max_new_tokens=8, temperature=0))]
    )
    stop = whole.tokens[3]
    rows: list[dict[str, Any]] = [
        {"stop_token_ids": stop},
        {"stop_token_ids": [stop, 0]},
        {"stop_token_ids": [stop], "include_stop_str_in_output": True},
        {"stop_token_ids": None},
        {"stop_token_ids": "many"},
        {"stop_token_ids": [10**6]},
    ]
    path = jsonl(tmp_path, *({"prompt": "the cat", **row} for row in rows))
    table = batch(path, "sample.temperature=0")
    at = whole.tokens.index(stop)
    assert table["output_tokens"].to_pylist() == [at, at, at + 1, len(whole.tokens), 0, 0]
    cut, again, kept, free = table["output"].to_pylist()[:4]
    assert free == whole.text and free.startswith(kept) and kept.startswith(cut) and cut == again
    assert [str(error)[:39] for error in table["error"].to_pylist()[4:]] == [
        "stop_token_ids='many' is not a token id", "stop_token_ids names a token outside 0 ",
    ]  # fmt: skip
