"""OpenAI batch files: the lines as they are, each a row with the settings of its body."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptray.config import UserError, load_config
from gptray.data.chat_template import ChatTemplate
from gptray.data.prompts import check_input, scan
from gptray.data.sources import SourceFile, find_files
from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.jobs.generate.checked import check_batch
from gptray.jobs.generate.openai_batch import RequestReader
from gptray.jobs.generate.output_plan import job_identity
from gptray.model.hf import save_pretrained
from tests.generation.batches import Batch, jsonl
from tests.generation.models import random_gpt, small_tokenizer

SETTINGS = load_config(None, []).generate


CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = small_tokenizer()
    return Engine(random_gpt(tokenizer), tokenizer, max_batch_size=16)


@pytest.fixture(scope="module")
def model_dir(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a template for chats."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    save_pretrained(random_gpt(tokenizer), folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


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
        {"prompt": small_tokenizer().encode("a dog"), "max_tokens": 3, "temperature": 0},
        {"prompt": [[9]], "logit_bias": {"5": 100}, "stop_token_ids": [5]},
        {"prompt": [10**6]},
    ]
    lines = [line(f"r{i}", **body) for i, body in enumerate(bodies)]
    batch = Batch(engine, small_tokenizer(), tmp_path)
    table = batch(
        jsonl(tmp_path, *lines), "sample.temperature=1", read_request=RequestReader(tmp_path)
    )
    assert table["error"].null_count == 6 and "a token outside 0 .. " in str(table["error"][6])
    assert table["id"].to_pylist() == table["custom_id"].to_pylist()
    assert table["prompt"].to_pylist()[:4] == ["the cat", "a dog", "", "the"]
    assert table["prompt"].to_pylist()[5:] == ["[9]", "[1000000]"]
    assert table["output_tokens"].to_pylist()[:2] == [4, 3]
    rows = table.to_pylist()
    assert rows[1]["seed"] == 7
    words = ("sample.temperature=0", "sample.max_new_tokens=3")
    assert rows[1]["output"] == batch.alone("a dog", 7, *words)
    assert rows[3]["output"] == small_tokenizer().decode([5, 5])
    assert rows[4]["output"] == rows[1]["output"] and rows[4]["prompt_tokens"] > 1
    assert (rows[5]["output"], rows[5]["finish_reason"]) == ("", "stop")
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
        ({"prompt": ["x", "y"]}, "prompt must be a single one"),
        ({"prompt": [[1], [2]]}, "prompt must be a single one"),
        ({"prompt": "x", "logprobs": 0}, "logprobs=0 is for the endpoint"),
        ({"prompt": "x", "add_special_tokens": False}, "add_special_tokens=False is for the end"),
        ({"prompt": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens=5 is for the end"),
        ({"prompt": "x", "return_token_ids": True}, "return_token_ids=True is for the endpoint"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages.*did you mean prompt"),
        ({"prompt": "x", "temprature": 1}, "temprature.*did you mean temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": "hot\ud800"}, r"temperature.*hot\\ud800"),
        ({}, "prompt is missing"),
    ],
)
def test_what_a_batch_row_cannot_have_is_its_error(
    body: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    request = RequestReader(tmp_path)(line("r", **body))
    assert re.search(problem, request.error or "")


def test_a_line_for_another_door_is_its_rows_error(tmp_path: Path) -> None:
    read = RequestReader(tmp_path)
    assert "url must be /v1/completions or /v1/chat" in str(read(line("r", url="/v1/x")).error)
    assert "method must be POST" in str(read({**line("r"), "method": "GET"}).error)
    assert "body must be an object" in str(read({**line("r"), "body": 1}).error)


def test_a_file_for_another_door_alone_is_refused_once(tmp_path: Path) -> None:
    lines = [line(f"r{i}", url="/v1/embeddings", input="x") for i in range(3)]
    assert "every request is for /v1/embeddings" in refused(jsonl(tmp_path, *lines))


def test_a_chat_is_answered_as_the_models_template_asks(
    engine: Engine, model_dir: Path, tmp_path: Path
) -> None:
    eos = small_tokenizer().eos_token
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "the cat"}], "max_completion_tokens": 4},
        {"messages": [{"role": "user", "content": f"say {eos}"}], "max_tokens": 2, "seed": 7},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True},
    ]
    lines = [line(f"r{i}", url=CHAT, **body) for i, body in enumerate(bodies)]
    lines.append(line("text", prompt="the cat", max_tokens=3))
    batch = Batch(engine, small_tokenizer(), tmp_path)
    reader = RequestReader(model_dir)
    rows = batch(jsonl(tmp_path, *lines), "sample.temperature=0", read_request=reader).to_pylist()
    assert [row["prompt"] for row in rows[:2]] == [
        f"user: the cat{eos}assistant:", f"user: say {eos}{eos}assistant:",
    ]  # fmt: skip
    assert [row["error"] and row["error"][:8] for row in rows] == [
        None, None, "messages", "logprobs", None,
    ]  # fmt: skip
    # The name in a message is text, and so more tokens than the one that the template writes.
    template = ChatTemplate(TEMPLATE, Tokenizer.load(model_dir))
    for row, body in zip(rows, bodies[:2], strict=False):
        assert row["prompt_tokens"] == len(template.prompt(body["messages"])[1])
        assert row["output_tokens"] <= 4
    assert rows[1]["prompt_tokens"] > len(small_tokenizer().chat_ids(rows[1]["prompt"]))
    given = {"prompt": rows[0]["prompt"], "max_tokens": 4}
    again = batch(
        jsonl(tmp_path, line("r", **given)), "sample.temperature=0", "sample.parse_special=true",
        read_request=reader,
    )  # fmt: skip
    assert again["output"].to_pylist() == [rows[0]["output"]]


def test_chats_for_a_model_without_a_template_are_refused(model_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("*.jinja"))
    chat = line("r", url=CHAT, messages=[{"role": "user", "content": "x"}])
    words = [
        f"generate.model={bare}", f"generate.input_path={jsonl(tmp_path, chat)}",
        f"generate.output_path={tmp_path}/out",
    ]  # fmt: skip
    with pytest.raises(UserError, match="bare has no chat template; use a model that has one"):
        check_batch(load_config(None, words))
    assert "no chat template" in str(RequestReader(bare)(chat).error)


def test_prompts_with_a_column_url_are_no_chats(model_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("*.jinja"))
    words = [
        f"generate.model={bare}", f"generate.output_path={tmp_path}/out",
        f"generate.input_path={jsonl(tmp_path, {'prompt': 'x', 'url': CHAT})}",
    ]  # fmt: skip
    assert check_batch(load_config(None, words)).model_dir == bare


def test_a_tokenizer_that_cannot_be_read_is_no_rows_error(model_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    (damaged / "tokenizer.json").write_text("{")
    chat = line("r", url=CHAT, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        RequestReader(damaged)(chat)


def test_what_writes_and_ends_a_text_is_part_of_the_job(model_dir: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model_dir, changed)
    chat = line("r", url=CHAT, messages=[{"role": "user", "content": "x"}])
    chats = find_files(str(jsonl(tmp_path, chat)))
    (tmp_path / "texts.jsonl").write_text('{"prompt": "x"}\n')
    texts = find_files(str(tmp_path / "texts.jsonl"))

    def differ(files: list[SourceFile]) -> bool:
        config = load_config(None, [])
        return job_identity(config, model_dir, files) != job_identity(config, changed, files)

    assert not differ(chats) and not differ(texts)
    (changed / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert differ(chats) and not differ(texts)
    (changed / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert differ(texts)


def test_a_name_twice_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, line("a", prompt="x"), line("a", prompt="y"))
    assert "p.jsonl:2: the id 'a' in column 'custom_id'" in refused(path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    assert "p.jsonl is an OpenAI batch file and" in refused(tmp_path)


def test_a_file_without_rows_is_of_either_kind(tmp_path: Path) -> None:
    jsonl(tmp_path, line("a", prompt="x"))
    (tmp_path / "empty.jsonl").write_text("")
    assert scan(find_files(str(tmp_path)), SETTINGS).rows == 1
