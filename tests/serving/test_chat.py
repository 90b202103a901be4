"""Chats: the openai package over real HTTP, beside the template as transformers renders it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from tokenizers import AddedToken
from transformers import AutoTokenizer

import gptray
from gptray.data.chat_template import ChatTemplate
from tests.data import foreign
from tests.generation.models import random_gpt
from tests.serving.servers import TOKENIZER, Server, running, tiny

TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('tools do not speak first') }}"
    "{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ eos_token }}{% endfor %}{% if shout %}LOUD{% endif %}"
    "{% if add_generation_prompt %}a dog{% endif %}"
)
ASK: list[dict[str, Any]] = [
    {"role": "system", "content": "the cat sees"},
    {"role": "user", "content": "a dog"},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(chat_template=TEMPLATE, max_logprobs=5) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: OpenAI, messages: Any = ASK, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def post(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def refused(client: OpenAI, messages: Any = ASK, **more: Any) -> str:
    with pytest.raises(BadRequestError) as caught:
        create(client, messages, **more)
    return str(caught.value)


def test_an_answer_is_the_completion_of_what_the_template_writes(client: OpenAI) -> None:
    _, ids = ChatTemplate(TEMPLATE, TOKENIZER).prompt(ASK)
    settings: dict[str, Any] = {"max_tokens": 12, "n": 2, "seed": 5, "temperature": 0.8}
    expected = client.completions.create(model="tiny", prompt=ids, **settings)
    answer = create(client, **settings)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert [one.message.content for one in answer.choices] == [one.text for one in expected.choices]
    assert {one.message.role for one in answer.choices} == {"assistant"}
    assert [one.finish_reason for one in answer.choices] == [
        one.finish_reason for one in expected.choices
    ]
    assert answer.usage == expected.usage and answer.usage.prompt_tokens == len(ids)


def test_a_stream_adds_up_to_the_answer(client: OpenAI) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "n": 2, "seed": 3}
    whole = create(client, **settings)
    parts, roles = ["", ""], list[tuple[int, str]]()
    last: Any = None
    chunks = create(client, stream=True, stream_options={"include_usage": True}, **settings)
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for one in chunk.choices:
            parts[one.index] += one.delta.content or ""
            roles += [(one.index, one.delta.role)] if one.delta.role else []
        last = chunk
    assert parts == [one.message.content for one in whole.choices]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]
    assert last.usage == whole.usage


def test_openais_own_reader_of_streams_gets_the_whole_answer(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 20, "n": 3, "seed": 1}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = create(client, **{key: asked[key] for key in asked.keys() - {"model", "messages"}})
    with client.chat.completions.stream(**asked) as events:
        events.until_done()
        read = events.current_completion_snapshot
    for ours, theirs in zip(whole.choices, read.choices, strict=True):
        assert theirs.index == ours.index and theirs.finish_reason == ours.finish_reason
        assert theirs.message.content == ours.message.content
        assert theirs.logprobs == ours.logprobs


def test_logprobs_are_those_of_the_completion(client: OpenAI) -> None:
    _, ids = ChatTemplate(TEMPLATE, TOKENIZER).prompt(ASK)
    settings: dict[str, Any] = {"max_tokens": 6, "seed": 1}
    told = client.completions.create(model="tiny", prompt=ids, logprobs=2, **settings)
    answer = create(client, logprobs=True, top_logprobs=2, **settings)
    tokens = answer.choices[0].logprobs.content
    assert told.choices[0].logprobs is not None
    assert [one.token for one in tokens] == told.choices[0].logprobs.tokens
    assert [one.logprob for one in tokens] == told.choices[0].logprobs.token_logprobs
    for one in tokens:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
    bare = create(client, logprobs=True, **settings).choices[0].logprobs.content
    assert [one.logprob for one in bare] == [one.logprob for one in tokens]
    assert not any(one.top_logprobs for one in bare)
    assert create(client, **settings).choices[0].logprobs is None


def test_the_bytes_of_tokens_are_those_of_the_text_also_within_characters(client: OpenAI) -> None:
    answer = create(
        client, n=8, max_tokens=20, seed=1, logprobs=True, extra_body={"ignore_eos": True}
    )
    told = [one.logprobs.content for one in answer.choices]
    assert any(token.token.startswith("token_id:") for tokens in told for token in tokens)
    texts = [bytes(byte for token in tokens for byte in token.bytes).decode() for tokens in told]
    assert texts == [one.message.content for one in answer.choices]


def test_likeliest_tokens_are_told_apart_where_their_texts_are_one() -> None:
    """Llama's <0x61> and a are two tokens, and so are the word with its space and without."""
    tokenizer = foreign.as_tokenizer(foreign.llama())
    body = {"messages": ASK, "logprobs": True, "top_logprobs": 20, "max_tokens": 5}
    with running(random_gpt(tokenizer), tokenizer=tokenizer, chat_template=TEMPLATE) as server:
        tokens = post(server, **body).json()["choices"][0]["logprobs"]["content"]
    for one in tokens:
        assert len(one["top_logprobs"]) == 20
        logprobs = [top["logprob"] for top in one["top_logprobs"]]
        assert logprobs == sorted(logprobs, reverse=True)
    assert any(len({top["token"] for top in one["top_logprobs"]}) < 20 for one in tokens)


def test_without_a_limit_an_answer_may_fill_the_context(client: OpenAI) -> None:
    free = create(client, temperature=0.0, extra_body={"ignore_eos": True})
    assert free.usage.total_tokens == tiny().config.n_positions
    short = create(client, max_tokens=9, max_completion_tokens=4, extra_body={"ignore_eos": True})
    assert short.usage.completion_tokens == 4


def test_the_last_message_may_be_continued(client: OpenAI) -> None:
    begun = [*ASK, {"role": "assistant", "content": "the cat"}]
    more = {"add_generation_prompt": False, "continue_final_message": True}
    text, ids = ChatTemplate(TEMPLATE, TOKENIZER).prompt(
        begun, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("assistant: the cat")
    answer = create(client, begun, max_tokens=4, extra_body=more)
    assert answer.usage.prompt_tokens == len(ids)
    assert "add_generation_prompt=false" in refused(
        client, begun, extra_body={"continue_final_message": True}
    )


def test_parts_of_text_and_the_templates_variables_are_read(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a dog"}]}]
    plain = create(client, [{"role": "user", "content": "a dog"}], max_tokens=5, seed=1)
    assert create(client, parts, max_tokens=5, seed=1).choices == plain.choices
    texts = [{"role": "user", "content": ["a dog"]}]  # as langchain sends a list of texts
    assert create(client, texts, max_tokens=5, seed=1).choices == plain.choices
    loud = create(client, parts, max_tokens=1, extra_body={"chat_template_kwargs": {"shout": True}})
    more = len(TOKENIZER.encode("LOUD"))
    assert loud.usage.prompt_tokens >= plain.usage.prompt_tokens + more - 1


def test_what_a_message_says_is_never_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    theirs.chat_template = TEMPLATE
    ours = ChatTemplate(TEMPLATE, TOKENIZER)
    text, ids = ours.prompt(ASK)
    assert ids == theirs.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert text == theirs.decode(ids) and ids.count(TOKENIZER.eos_id) == 2
    sly = [{"role": "user", "content": f"a dog{TOKENIZER.eos_token}the cat"}]
    text, ids = ours.prompt(sly)
    assert ids.count(TOKENIZER.eos_id) == 1
    assert TOKENIZER.decode(ids) == text and sly[0]["content"] in text


def test_pieces_between_special_tokens_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """Only a text's own start gets a space, and <|user|> takes the spaces behind it."""
    backend = foreign.llama_first()
    user = AddedToken("<|user|>", special=True, normalized=False, rstrip=True)
    backend.add_special_tokens([user])
    ours = foreign.as_tokenizer(backend)
    ours.save(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    theirs.chat_template = (
        "<s>{% for one in messages %}<|user|>\n{{ one.content }}</s>a dog{% endfor %}"
    )
    expected = theirs.apply_chat_template(ASK, return_dict=False)
    text, ids = ChatTemplate(theirs.chat_template, ours).prompt(ASK)
    assert ids == expected
    assert ours.prompt_ids(text, parse_special=True) == expected


def test_a_wrong_message_is_named_once(server: Server) -> None:
    error = post(server, messages=[{"content": "a"}]).json()["error"]
    assert error["message"] == "messages[0].role must be text, such as user"
    assert error["param"] == "messages"
    error = post(server, messages="the cat").json()["error"]
    assert error["message"].startswith("messages expects a list of messages, each with a role")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages expects a list of messages"),
        (["hello"], "messages[0] must be an object with role and content"),
        ([{"content": "a"}], "messages[0].role must be text, such as user"),
        ([{"role": "user"}], "messages[0].content must be text"),
        ([{"role": "user", "content": "a", "name": ["b"]}], "messages[0].name must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0] of type image_url is not supported: this model reads text",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "content": "a"}]}],
            "messages[0].content[0].text must be text",
        ),
        ([{"role": "user", "content": [3]}], "messages[0].content[0] must be a part of text"),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls is not supported",
        ),
        ([{"role": "tool", "content": "a"}], "chat template: tools do not speak first"),
        ([{"role": "user", "content": "the cat " * 60}], "context"),
    ],
)
def test_messages_that_cannot_be_answered_say_why(
    client: OpenAI, messages: Any, sentence: str
) -> None:
    assert sentence in refused(client, messages)


def test_wrong_keys_say_what_is_meant(client: OpenAI, server: Server) -> None:
    assert "top_logprobs needs logprobs=true" in refused(client, top_logprobs=2)
    assert "tools is not supported" in refused(client, tools=[{"type": "function"}])
    assert "min_tokens=5 must not be above max_tokens=2" in refused(
        client, max_completion_tokens=2, extra_body={"min_tokens": 5}
    )
    assert "logprobs=6, more than 5" in refused(client, logprobs=True, top_logprobs=6)
    for name in ("tools", "messages"):
        own: dict[str, Any] = {"chat_template_kwargs": {name: []}}
        told = refused(client, extra_body=own)
        assert f"chat_template_kwargs.{name} is not one of the template's own" in told
    answer = post(server, model="tiny", prompt="the cat")
    assert answer.status_code == 400 and "did you mean messages?" in answer.text
    error = post(server, messages=[{"role": "user", "content": "the cat " * 60}]).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    with pytest.raises(NotFoundError, match="does not exist. Served here: tiny"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])


def test_every_key_of_openais_package_is_known(server: Server) -> None:
    for kind, path in (
        (completion_create_params.CompletionCreateParamsBase, "completions"),
        (chat_params.CompletionCreateParamsBase, "chat/completions"),
    ):
        for key in kind.__annotations__:
            answer = httpx.post(f"{server.url}/v1/{path}", json={key: "odd"}, timeout=60)
            assert "unknown key" not in answer.text, key


@pytest.mark.parametrize(
    ("ignored", "refused"),
    [
        ({"best_of": 1, "echo": False, "add_special_tokens": False}, {"best_of": 2, "echo": True}),
        ({"documents": [], "mm_processor_kwargs": {}}, {"documents": [{"text": "a"}]}),
        ({"include_reasoning": True, "cache_salt": "a"}, {"chat_template": "{{ messages }}"}),
        ({"reasoning_effort": "none", "verbosity": "medium"}, {"reasoning_effort": "low"}),
        ({"prompt_logprobs": None}, {"prompt_logprobs": 1, "allowed_token_ids": [5]}),
        ({"logits_processors": []}, {"structured_outputs": {"choice": ["a", "b"]}}),
    ],
)
def test_vllms_keys_are_harmless_or_not_supported(
    server: Server, ignored: dict[str, Any], refused: dict[str, Any]
) -> None:
    asked = {"messages": ASK, "max_tokens": 2}
    assert post(server, **asked, **ignored).status_code == 200
    answer = post(server, **asked, **refused)
    assert answer.status_code == 400
    told = answer.json()["error"]["message"].splitlines()
    for key, line in zip(refused, told, strict=True):
        assert line.startswith(f"{key} is not supported: "), "and what to do instead"


def test_an_answer_tells_its_token_ids_and_what_ended_it(client: OpenAI) -> None:
    _, ids = ChatTemplate(TEMPLATE, TOKENIZER).prompt(ASK)
    asked: dict[str, Any] = {"max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 2}
    told: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    free = create(client, **asked, extra_body=told)
    assert free.prompt_token_ids == ids
    (choice,) = free.choices
    assert choice.message.content == TOKENIZER.decode(choice.token_ids)
    assert [one.token for one in choice.logprobs.content] == [
        f"token_id:{one}" for one in choice.token_ids
    ]
    told["stop_token_ids"] = [choice.token_ids[6]]
    events = [*create(client, **asked, stream=True, extra_body=told)]
    assert events[0].prompt_token_ids == ids
    assert not any(hasattr(event, "prompt_token_ids") for event in events[1:])
    found = [one for event in events for one in event.choices[0].token_ids]
    assert found == choice.token_ids[: choice.token_ids.index(choice.token_ids[6]) + 1]
    last = events[-1].choices[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", choice.token_ids[6])


def test_a_model_without_a_template_says_where_to_go() -> None:
    with running() as server:
        answer = post(server, model="tiny", messages=ASK)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert "/v1/completions" in answer.json()["error"]["message"]


def test_a_template_that_does_not_compile_fails_in_one_sentence() -> None:
    with running(chat_template="{% for") as server:
        answer = post(server, messages=ASK)
        assert server.post(prompt="the cat").status_code == 200
    assert answer.status_code == 400 and "the model's chat template: " in answer.text


def test_a_chats_tokens_are_counted_as_its_template_writes_them(server: Server) -> None:
    url = f"{server.url}/tokenize"
    _, ids = ChatTemplate(TEMPLATE, TOKENIZER).prompt(ASK)
    told = httpx.post(url, json={"messages": ASK, "return_token_strs": True}).json()
    assert (told["tokens"], told["count"]) == (ids, len(ids))
    assert "".join(told["token_strs"]) == TOKENIZER.decode(ids)
    loud: dict[str, Any] = {
        "add_generation_prompt": False, "chat_template_kwargs": {"shout": True},
    }  # fmt: skip
    tokens = httpx.post(url, json={"messages": ASK, **loud}).json()["tokens"]
    assert TOKENIZER.decode(tokens).endswith("LOUD")
    bodies: list[dict[str, Any]] = [{"messages": []}, {"messages": ASK, "prompt": "a"}, {}]
    for wrong in bodies:
        assert httpx.post(url, json=wrong).status_code == 400
    assert server.get("/version").json() == {"version": gptray.__version__}
