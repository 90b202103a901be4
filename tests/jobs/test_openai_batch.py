"""OpenAI batch files: the lines as they are, each a row with the settings of its body."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gptray.config import UserError, load_config
from gptray.data.prompts import check_input, scan
from gptray.data.sources import find_files
from gptray.generation.engine import Engine
from gptray.jobs.generate.openai_batch import read_request
from tests.generation.batches import Batch, jsonl
from tests.generation.models import random_gpt, small_tokenizer

SETTINGS = load_config(None, []).generate


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = small_tokenizer()
    return Engine(random_gpt(tokenizer), tokenizer, max_batch_size=16)


def line(name: str, *, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "tiny", **body}}


def refused(path: Path) -> str:
    files = find_files(str(path))
    with pytest.raises(UserError) as caught:
        check_input(files, SETTINGS)
        scan(files, SETTINGS)
    return str(caught.value)


def test_a_body_sets_its_row_and_the_line_passes_through(engine: Engine, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "the cat", "max_tokens": 4},
        {"prompt": ["a dog"], "max_tokens": 3, "temperature": 0, "seed": 7, "top_k": -1},
        {"prompt": "", "stop": ["dog"], "user": "me", "n": 1, "stream": False, "logprobs": None},
        {"prompt": "the", "presence_penalty": 2, "logit_bias": {"5": 100}, "max_tokens": 2},
    ]
    lines = [line(f"r{i}", **body) for i, body in enumerate(bodies)]
    batch = Batch(engine, small_tokenizer(), tmp_path)
    table = batch(jsonl(tmp_path, *lines), "sample.temperature=1", read_request=read_request)
    assert table["error"].null_count == 4
    assert table["id"].to_pylist() == table["custom_id"].to_pylist() == ["r0", "r1", "r2", "r3"]
    assert table["prompt"].to_pylist() == ["the cat", "a dog", "", "the"]
    assert table["output_tokens"].to_pylist()[:2] == [4, 3]
    rows = table.to_pylist()
    assert rows[1]["seed"] == 7
    words = ("sample.temperature=0", "sample.max_new_tokens=3")
    assert rows[1]["output"] == batch.alone("a dog", 7, *words)
    assert rows[3]["output"] == small_tokenizer().decode([5, 5])
    passed = [{key: row[key] for key in lines[0]} for row in rows]
    for given, got in zip(lines, passed, strict=True):
        body = got["body"]
        body = json.loads(body) if isinstance(body, str) else body
        assert {key: value for key, value in body.items() if value is not None} == {
            key: value for key, value in given["body"].items() if value is not None
        }


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"prompt": "x", "n": 2}, "n=2.*generate.num_samples"),
        ({"prompt": "x", "logprobs": 3}, "logprobs=3 is for the endpoint"),
        ({"prompt": "x", "echo": True}, "echo=True is for the endpoint"),
        ({"prompt": "x", "stream": True}, "stream=True is for the endpoint"),
        ({"prompt": ["x", "y"]}, "prompt must be one text"),
        ({"prompt": [1, 2]}, "prompt must be one text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"prompt": "x", "temprature": 1}, "temprature.*did you mean temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": "hot\ud800"}, r"temperature.*hot\\ud800"),
        ({}, "prompt is missing"),
    ],
)
def test_what_a_batch_row_cannot_have_is_its_error(body: dict[str, Any], problem: str) -> None:
    request = read_request(line("r", **body))
    assert re.search(problem, request.error or "")


def test_a_line_for_another_door_is_its_rows_error(tmp_path: Path) -> None:
    assert "url must be /v1/completions" in str(read_request(line("r", url="/v1/x")).error)
    assert "method must be POST" in str(read_request({**line("r"), "method": "GET"}).error)
    assert "body must be an object" in str(read_request({**line("r"), "body": 1}).error)


def test_a_file_of_chat_alone_is_refused_once(tmp_path: Path) -> None:
    chat = [line(f"r{i}", url="/v1/chat/completions", messages=[]) for i in range(3)]
    assert "every request is for /v1/chat/completions" in refused(jsonl(tmp_path, *chat))


def test_a_name_twice_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, line("a", prompt="x"), line("a", prompt="y"))
    assert "p.jsonl:2: the id 'a' in column 'custom_id'" in refused(path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    assert "p.jsonl is an OpenAI batch file and" in refused(tmp_path)


def test_a_file_without_rows_is_of_either_kind(tmp_path: Path) -> None:
    jsonl(tmp_path, line("a", prompt="x"))
    (tmp_path / "empty.jsonl").write_text("")
    assert scan(find_files(str(tmp_path)), SETTINGS).rows == 1
