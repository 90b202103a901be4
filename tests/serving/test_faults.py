"""What a server survives: wrong requests, too many, clients that go, a stop, a model replaced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gptray.config import UserError
from gptray.serving.api_keys import Keys, read_keys
from gptray.serving.telemetry import side_by_side
from tests.serving.requests import fuzzed
from tests.serving.servers import TOKENIZER, Server, running, served, tiny

# Thousands of steps: whoever leaves it is gone long before its end.
LONG = {"prompt": "the", "max_tokens": 4000, "ignore_eos": True, "stream": True}
GOOD = {"prompt": "the cat", "max_tokens": 8, "seed": 3}
FUZZED = 300
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def long_tiny(seed: int = 0) -> Any:
    return tiny(seed, n_positions=4096)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits: dict[str, Any] = {"max_outputs": 7, "max_n": 2, "max_stop": 2, "max_logprobs": 4}
    with running(max_body_bytes=3000, max_output_tokens=20, **limits) as server:
        yield server


@contextmanager
def stream(server: Server, **body: Any) -> Iterator[Iterator[str]]:
    """A stream whose first event has come."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        first = next(lines)
        assert first.startswith("data: {")
        yield chain([first], lines)


def text_of(lines: Iterator[str]) -> str:
    """The text of a stream."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def until(server: Server, metric: str, value: float) -> None:
    """Ask until a metric has a value; a test that hangs here has failed."""
    while server.metric(metric) != value:
        pass


def raw(server: Server, body: bytes, **headers: str) -> httpx.Response:
    kind = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/v1/completions", content=body, headers=kind | headers)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"prompt": "x", "seed": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not valid JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large"),
        (
            b'{"prompt": "x", "seed": 1' + b"0" * 400 + b"}",
            "seed must be at most 9223372036854775807",
        ),
        (b'{"prompt": "' + b"\\ud800" + b'"}', "surrogate"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"prompt": "x", "prompt": "y"}', "duplicate key 'prompt'"),
        (b'{"prompt": ' + b"[" * 1400 + b"]" * 1400 + b"}", "nested too deeply"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": null}', "prompt is missing"),
        (b'{"prompt": []}', "prompt expects text"),
        (b'{"prompt": [[]]}', "prompt expects text"),
        (b'{"prompt": [[[1]]]}', "prompt expects text"),
        (b'{"prompt": ["x", 1]}', "prompt expects text"),
        (b'{"prompt": [true]}', "prompt expects text"),
        (b'{"prompt": [-1]}', "outside 0 .. "),
        (b'{"prompt": [99999]}', "outside 0 .. "),
        (b'{"prompt": [' + b"1, " * 80 + b"1]}", "the prompt is too long: 81 tokens"),
        (b'{"prompt": "x", "top_k": 9223372036854775808}', "top_k must be at most 2147483647"),
        (b'{"prompt": "x", "temperature": 1e300}', "temperature must be at most 100"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens expects a whole number"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens expects a whole number"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens=0"),
        (b'{"prompt": "x", "n": 3}', "n=3, more than 2"),
        (b'{"prompt": "x", "n": 2, "best_of": 1}', "best_of=1 must be n=2"),
        (b'{"prompt": ["a", "b", "c", "d"], "n": 2}', "8 outputs, more than 7 (serve.max_outputs)"),
        (b'{"prompt": "x", "stop": ["a", "b", "c"]}', "stop has 3 entries, more than 2"),
        (b'{"prompt": "x", "stop": ""}', "stop expects text"),
        (b'{"prompt": "x", "stop": "' + b"y" * 257 + b'"}', "stop takes texts of at most 256"),
        (b'{"prompt": "x", "logprobs": 5}', "logprobs=5, more than 4"),
        (b'{"prompt": "x", "logit_bias": {"999999": 1}}', "logit_bias names a token outside"),
        (b'{"prompt": "x", "logit_bias": {"01": 1}}', "logit_bias expects"),
        (b'{"prompt": "x", "logit_bias": [1]}', "logit_bias expects"),
        (b'{"prompt": "x", "repetition_penalty": 1e-300}', "repetition_penalty must be at least"),
        (b'{"prompt": "x", "stop_token_ids": [1, 2, 3]}', "stop_token_ids has 3 entries, more th"),
        (b'{"prompt": "x", "stop_token_ids": [-1]}', "stop_token_ids expects a list of token ids"),
        (b'{"prompt": "x", "stop_token_ids": [true]}', "stop_token_ids expects a list of token"),
        (b'{"prompt": "x", "stop_token_ids": [1.0]}', "stop_token_ids expects a list of token"),
        (b'{"prompt": "x", "stop_token_ids": 5}', "stop_token_ids expects a list of token ids"),
        (b'{"prompt": "x", "stop_token_ids": [99999]}', "stop_token_ids names a token outside"),
        (b'{"prompt": "x", "include_stop_str_in_output": 1}', "output expects true or false"),
        (b'{"prompt": "x", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens must be at lea"),
        (b'{"prompt": "x", "eos_token_id": 5}', "did you mean stop_token_ids?"),
        (b'{"prompt": "x", "suffix": "y"}', "suffix is not supported: "),
        (b'{"prompt": "x", "temprature": 1}', "did you mean temperature?"),
        (b'{"prompt": "x", "stream_options": {"include_use": 1}}', "did you mean include_usage?"),
        (b'{"prompt": "x", "stream_options": []}', "stream_options expects an object or null"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(server: Server, body: bytes, message: str) -> None:
    answer = raw(server, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"prompt": [1] * 81}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a", "the cat " * 60]}, "prompt", "context_length_exceeded"),
        ({"prompt": [99999]}, "prompt", None),
        ({"logit_bias": {"999999": 1}}, "logit_bias", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"n": 2, "best_of": 1}, "best_of", None),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", None),
    ],
)
def test_an_error_names_the_key_that_is_wrong_and_a_long_prompt_in_openais_code(
    server: Server, wrong: dict[str, Any], param: str, code: str | None
) -> None:
    answer = server.post(**GOOD | wrong)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_what_stands_at_its_limit_is_answered(server: Server) -> None:
    body = {"prompt": ["a", "b", "c"], "n": 2, "stop": ["y", "z"], "logprobs": 4, "max_tokens": 20}
    assert server.post(**body).status_code == 200


def test_other_ways_of_asking_wrongly(server: Server) -> None:
    assert raw(server, b"x" * 3001).status_code == 413
    assert httpx.post(f"{server.url}/v1/completions", content=iter([b"x" * 9000]), headers={
        "content-type": "application/json"}).status_code == 413  # fmt: skip
    assert raw(server, b"{}", **{"content-type": "text/plain"}).status_code == 415
    assert raw(server, b"{}", **{"content-encoding": "gzip"}).status_code == 415
    plain = raw(server, json.dumps(GOOD).encode(), **{"content-encoding": "Identity"})
    assert plain.status_code == 200
    missing = server.get("/v1/completion")
    assert missing.status_code == 404
    assert "did you mean /v1/completions?" in missing.json()["error"]["message"]
    assert server.get("/v1/completions").status_code == 405
    # TGI's clients call the root.
    told = httpx.post(server.url, json={"inputs": "the cat"}).json()["error"]["message"]
    assert (
        told == "/ does not take POST; to complete text, call POST /v1/completions, with `prompt`"
    )
    assert server.get("/v1/models/../../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/messages", "call POST /v1/chat/completions, with `messages`"),
        ("/v1/responses", "call POST /v1/completions, with `prompt` instead of `input`"),
        ("/v1/embeddings", "to complete text, call POST /v1/completions"),
        ("/completions", "did you mean /v1/completions?"),
        ("/v1/images/generations", "to complete text, call POST /v1/completions"),
    ],
)
def test_what_has_no_counterpart_says_what_to_call_instead(
    server: Server, path: str, told: str
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    assert told in answer.json()["error"]["message"]


def test_fuzzed_requests_get_an_answer_in_form_and_harm_nobody(server: Server) -> None:
    good = server.post(**GOOD).json()["choices"]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for body in fuzzed(FUZZED, seed=7, vocab_size=TOKENIZER.vocab_size):
            kind = {"content-type": "application/json"}
            answer = client.post("/v1/completions", content=body, headers=kind)
            assert answer.status_code in (200, 400, 404, 413), (body[:300], answer.text)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert server.post(**GOOD).json()["choices"] == good


def test_a_body_that_is_never_sent_whole_ends_quietly(server: Server) -> None:
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt')
    until(server, 'gptray_requests_total{path="/v1/completions",status="499"}', 3)
    assert server.post(**GOOD).status_code == 200


def test_a_client_that_goes_away_frees_its_slots() -> None:
    with running(long_tiny()) as server:
        for _ in range(3):
            with stream(server, **LONG, n=4):
                pass
        body = json.dumps({**LONG, "stream": False}).encode()
        with server.connect() as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            until(server, "gptray_sequences_running", 1)
        until(server, "gptray_sequences_running", 0)
        assert server.metric("gptray_sequences_waiting") == 0
        assert server.metric("gptray_output_tokens_total") < 4000
        assert server.endpoint.active == 0


def test_a_full_line_says_so_with_a_status_also_to_who_asks_for_a_stream() -> None:
    with running(long_tiny(), max_batch_size=2, max_waiting=2) as server, ExitStack() as open_ones:
        url, kept = f"{server.url}/v1/completions", []
        for _ in range(4):  # of the last two no token comes, but the line that they were accepted
            answer = open_ones.enter_context(httpx.stream("POST", url, json=LONG, timeout=60))
            kept.append(answer.iter_lines())
            assert next(kept[-1]) == ": accepted"
        assert server.metric("gptray_sequences_waiting") == 2
        for wanted in ({"n": 2}, {"stream": True}):
            refused = server.post(prompt="a", **wanted)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        read = 4 * len(TOKENIZER.encode("the"))
        assert server.metric("gptray_prompt_tokens_total") == read, "what is refused is not read"
        assert server.get("/health").status_code == 200
        open_ones.close()
        until(server, "gptray_sequences_running", 0)
        assert server.post(prompt="a", n=2, max_tokens=3).status_code == 200


def test_a_request_that_takes_too_long_ends_and_frees_its_slot() -> None:
    with running(long_tiny(), request_timeout_s=0.2) as server:
        assert server.post(**{**LONG, "stream": False}).status_code == 408
        with stream(server, **LONG) as lines:
            events = [line for line in lines if line]
        assert (
            "request_timeout_s" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        )
        until(server, "gptray_sequences_running", 0)


def test_a_stop_lets_streams_finish_and_refuses_new_requests() -> None:
    body = {**LONG, "max_tokens": 500}
    with running(long_tiny()) as server, stream(server, **body) as lines:
        drained = asyncio.run_coroutine_threadsafe(server.endpoint.drain(60), server.loop)
        refused = server.post(**GOOD)
        assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
        assert server.get("/health").status_code == 503
        assert not drained.done()
        assert text_of(lines)
        assert drained.result() == 0


def test_a_stop_does_not_wait_for_ever() -> None:
    with running(long_tiny()) as server, stream(server, **LONG):
        drained = asyncio.run_coroutine_threadsafe(server.endpoint.drain(0), server.loop)
        assert drained.result() == 1


def test_a_new_model_takes_over_while_a_stream_ends_on_the_old_one() -> None:
    body = {**LONG, "max_tokens": 500, "seed": 1}
    with running(long_tiny()) as server:
        with stream(server, **body) as lines:
            whole = text_of(lines)
        old = server.endpoint.served
        assert old is not None
        with stream(server, **body) as lines:
            after = served(long_tiny(seed=9), server.limits, "new")
            server.loop.call_soon_threadsafe(server.endpoint.serve, after)
            while server.get("/v1/models").json()["data"][0]["id"] != "new":
                pass
            assert server.post(**GOOD).json()["model"] == "new"
            assert old.thread.alive
            assert text_of(lines) == whole
        while old.thread.alive:
            pass
        assert server.post(**GOOD).status_code == 200


def test_health_says_that_an_engine_is_dead_or_its_model_gives_no_numbers() -> None:
    dead, damaged = tiny(), tiny()
    dead.transformer.wpe.weight.data = dead.transformer.wpe.weight.data[:0]
    torch.nn.init.constant_(damaged.get_parameter("transformer.ln_f.weight"), float("nan"))
    for model, status in ((dead, 503), (damaged, 500)):
        with running(model) as server:
            assert server.get("/health").status_code == 503
            answer = server.post(**GOOD)
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "server_error"
            events = server.post(**GOOD, stream=True).text
            assert "server_error" in events
            assert server.get("/metrics").status_code == 200


def test_a_page_of_an_allowed_origin_may_call_and_its_preflight_needs_no_key() -> None:
    page, path = {"origin": "https://a.example"}, "/v1/completions"
    asks = {**page, "access-control-request-method": "POST"}
    asks |= {"access-control-request-headers": "authorization,content-type"}
    with running(allowed_origins="https://a.example") as server:
        preflight = httpx.options(f"{server.url}{path}", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        answer = httpx.post(f"{server.url}{path}", json=GOOD, headers=page)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.post(
            f"{server.url}{path}", json=GOOD, headers={"origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in other.headers
    with running() as server:
        assert httpx.options(f"{server.url}{path}", headers=asks).status_code == 405


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions"])
def test_a_slash_too_many_is_no_redirect_which_could_send_a_key_astray(path: str) -> None:
    with running() as server:
        answer = httpx.post(f"{server.url}{path}", json=GOOD)
        assert answer.status_code == 200, answer.headers
        assert server.metric('gptray_requests_total{path="/v1/completions",status="200"}') == 1


def test_head_allow_and_a_trailing_slash_are_as_http_has_them() -> None:
    with running() as server:
        head = httpx.head(f"{server.url}/v1/models")
        assert head.status_code == 200 and not head.content
        wrong = httpx.get(f"{server.url}/v1/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        assert server.get("/v1/models/").json() == server.get("/v1/models").json()


def test_a_body_of_many_keys_is_refused_in_one_short_message() -> None:
    wrong = {f"key{number}": 1 for number in range(4000)}
    with running() as server:
        unknown = server.post(prompt="x", **wrong)
        many = server.post(prompt="x", logit_bias={str(number): 0 for number in range(5000)})
        twice = raw(server, b"{" + b'"a": 1, ' * 50_000 + b'"prompt": "x"}')
        long = server.post(prompt="x", **{"y" * 50_000: 1})
    assert len(long.json()["error"]["param"]) < 100 > len(long.json()["error"]["message"])
    assert unknown.status_code == many.status_code == twice.status_code == 400
    message = unknown.json()["error"]["message"]
    assert message.count("unknown") == 12 and message.endswith("\n... and more")
    assert "5,000 keys, more than 4,096" in many.json()["error"]["message"]
    assert "keys, more than 4,096" in twice.json()["error"]["message"]


def test_a_line_of_the_key_file_is_a_key_and_a_comment_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# team A\n\nsk-one\r\n  sk-two  \n")
    path.chmod(0o600)
    keys = read_keys(str(path))
    assert len(keys) == 2 and not caplog.records
    with running(keys=Keys(str(path), keys)) as server:
        for key, status in (
            ("sk-one", 200),
            ("sk-two", 200),
            ("team", 401),
            ("#", 401),
            ("A", 401),
        ):
            assert server.get("/v1/models", authorization=f"Bearer {key}").status_code == status
    path.chmod(0o644)
    read_keys(str(path))
    assert "is readable by other users" in caplog.text
    path.write_text("sk-one two\n")
    with pytest.raises(UserError, match="line 1: a key must be printable ASCII without spaces"):
        read_keys(str(path))
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="it has no key"):
        read_keys(str(path))


def test_a_key_opens_every_route_and_none_but_health_is_open_without(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("first-key\nsecond-key\n")
    routes = [
        ("GET", "/"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
        ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"), ("GET", "/nowhere"), ("GET", "/health/x"), ("GET", "/metrics/"),
        ("GET", "//metrics"), ("POST", "//v1/completions/"),
    ]  # fmt: skip
    with (
        running(keys=Keys(str(path), read_keys(str(path)))) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for method, route in routes:
            for value in ("", "Bearer wrong", "Bearer", "first-key", "Basic first-key"):
                answer = client.request(method, route, headers={"Authorization": value})
                assert answer.status_code == 401, (route, value)
                assert answer.headers["www-authenticate"] == "Bearer"
                if route.startswith("/v1"):
                    said = "is incorrect" if value == "Bearer wrong" else "is required"
                    assert f"API key {said}" in answer.json()["error"]["message"]
            for key in ("first-key", "second-key"):
                inside = {"Authorization": f"Bearer {key}"}
                assert client.request(method, route, headers=inside).status_code != 401
        assert client.get("/health").status_code == 200


def test_metrics_count_and_hold_no_text() -> None:
    with running() as server:
        server.post(prompt="the secret cat", max_tokens=7, ignore_eos=True)
        server.get("/somewhere/secret")
        assert server.metric("gptray_output_tokens_total") == 7
        prompt = len(TOKENIZER.encode("the secret cat"))
        assert server.metric("gptray_prompt_tokens_total") == prompt
        assert server.metric("gptray_first_token_seconds_count") == 1
        assert server.metric("gptray_per_token_seconds_count") == 6
        assert server.metric("gptray_step_sequences_total") == 7
        assert server.metric('gptray_requests_total{path="other",status="404"}') == 1
        assert "secret" not in server.get("/metrics").text


def test_what_several_servers_count_stands_side_by_side() -> None:
    with running() as one, running() as two:
        for number, server in enumerate((one, two), start=1):
            server.post(prompt="a", max_tokens=3 * number, ignore_eos=True)
        texts = {name: s.get("/metrics").content for name, s in (("one", one), ("two", two))}
    text = side_by_side(texts).decode()
    assert 'gptray_output_tokens_total{server="one"} 3.0' in text
    assert 'gptray_output_tokens_total{server="two"} 6.0' in text
    assert 'gptray_first_token_seconds_bucket{le="+Inf",server="two"} 1.0' in text
    assert text.count("# TYPE gptray_output_tokens_total counter") == 1
