"""What a client gets: the openai package and lm-eval's requests over real HTTP, a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI

from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.example import load_example, save_example
from gptray.serving.api_error import ApiError
from gptray.serving.protocol import CompletionRequest, parse_request
from tests.data import foreign
from tests.generation.models import random_gpt
from tests.serving.servers import TOKENIZER, Server, running, tiny

EOS = TOKENIZER.eos_id


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def answered(server: Server, **body: Any) -> dict[str, Any]:
    """The only choice of an answer; of a stream, what its events add up to."""
    answer = server.post(**body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event)["choices"][0] for event in events]
    assert not any("prompt_token_ids" in part for part in parts[1:])
    whole = {**parts[0], **parts[-1], "text": "".join(part["text"] for part in parts)}
    if "token_ids" in whole:
        whole["token_ids"] = [one for part in parts for one in part["token_ids"]]
    return whole


def texts(prompt: str, *, n: int = 1, first: int = 0, **sampling: Any) -> list[str]:
    """What the engine writes, asked directly, from row `first` of the seed on."""
    engine = Engine(tiny(), TOKENIZER, max_batch_size=4)
    settings = Sampling(**sampling)
    ids = TOKENIZER.prompt_ids(prompt)
    rows = range(first, first + n)
    return [g.text for g in engine.run([Sequence(ids, settings, row) for row in rows])]


def test_the_openai_package_gets_what_the_engine_writes(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    done = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=12, n=3, seed=5, temperature=0.8, top_p=0.9
    )
    expected = texts("the cat", n=3, max_new_tokens=12, seed=5, temperature=0.8, top_p=0.9)
    assert [choice.text for choice in done.choices] == expected
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert done.usage and done.usage.prompt_tokens == len(TOKENIZER.encode("the cat"))
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.object == "text_completion" and done.id.startswith("cmpl-")


def test_a_stream_gives_the_same_text_token_by_token(client: OpenAI) -> None:
    korean = "\uc61b\ub0a0 \uc61b\uc801\uc5d0"
    for seed in range(4):
        stream = client.completions.create(
            model="tiny", prompt=[korean, "the"], max_tokens=30, n=2, seed=seed, stream=True,
            logprobs=1, stream_options={"include_usage": True},
        )  # fmt: skip
        parts, reasons, tokens, last = [""] * 4, [""] * 4, 0, None
        for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
                assert choice.logprobs and choice.logprobs.tokens is not None
                tokens += len(choice.logprobs.tokens)
            last = chunk
        settings = {"n": 2, "max_new_tokens": 30, "seed": seed}
        own = texts(korean, **settings)
        assert parts == own + texts("the", first=2, **settings)
        assert set(reasons) <= {"stop", "length"}
        assert last and not last.choices and last.usage and last.usage.completion_tokens == tokens


def test_stop_strings_end_the_text_before_them(client: OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="a dog", max_tokens=30, temperature=0)
    stop = free.choices[0].text[9:12]
    cut = client.completions.create(
        model="tiny", prompt="a dog", max_tokens=30, temperature=0, stop=[stop, "never there"]
    )
    assert cut.choices[0].text == free.choices[0].text.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_tokens_and_kept_stops_say_what_ended_the_text(server: Server, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": "a dog", "max_tokens": 30, "seed": 5, "stream": stream}
    free = answered(server, return_token_ids=True, **body)
    assert (free["stop_reason"], len(free["token_ids"])) == (None, 30)
    assert free["prompt_token_ids"] == TOKENIZER.encode("a dog")
    assert TOKENIZER.decode(free["token_ids"]) == free["text"]
    token, stop = free["token_ids"][9], free["text"][9:12]
    ids = free["token_ids"][: free["token_ids"].index(token)]
    for kept in (False, True):
        body |= {"include_stop_str_in_output": kept}
        cut = answered(server, stop_token_ids=[token, 1], return_token_ids=True, **body)
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", token)
        assert cut["token_ids"] == [*ids, token], "also of the token that ended the text"
        assert cut["text"] == TOKENIZER.decode([*ids, token] if kept else ids)
        cut = answered(server, stop=[stop], **body)
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
        assert cut["text"] == free["text"].partition(stop)[0] + stop * kept
        assert not {"token_ids", "prompt_token_ids"} & {*cut}
    again = answered(server, **{**body, "prompt": free["prompt_token_ids"]})
    assert again["text"] == free["text"]


def test_tokens_are_named_by_their_ids_if_asked(server: Server) -> None:
    body = {"prompt": "the", "max_tokens": 6, "seed": 1, "logprobs": 3, "return_token_ids": True}
    choice = answered(server, **body, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == [f"token_id:{one}" for one in choice["token_ids"]]
    by_text = answered(server, **body)
    assert choice["logprobs"]["token_logprobs"] == by_text["logprobs"]["token_logprobs"]
    for top in choice["logprobs"]["top_logprobs"]:
        assert len(top) in (3, 4) and all(one.startswith("token_id:") for one in top)


def test_a_prompt_is_cut_to_its_last_tokens_if_asked(server: Server) -> None:
    long = "the cat sees a dog. " * 30
    ids = TOKENIZER.encode(long)[-7:]
    body: dict[str, Any] = {"max_tokens": 8, "seed": 3, "echo": True}
    for prompt in (long, TOKENIZER.encode(long)):
        assert server.post(prompt=prompt, **body).status_code == 400
        cut = answered(server, prompt=prompt, truncate_prompt_tokens=7, **body)
        assert cut == answered(server, prompt=ids, **body)
    assert answered(server, prompt="the", truncate_prompt_tokens=99, **body)["text"][:3] == "the"


@pytest.mark.parametrize("seed", [None, 5])
def test_prompts_of_one_request_are_independent_draws(server: Server, seed: int | None) -> None:
    body = {"prompt": ["the cat"] * 20, "max_tokens": 8, "n": 2, "seed": seed}
    choices = server.post(**body).json()["choices"]
    assert len({choice["text"] for choice in choices}) >= 38
    again = server.post(**body).json()["choices"]
    assert (again == choices) == (seed is not None)


def test_an_empty_prompt_starts_a_fresh_document(server: Server) -> None:
    body = {"max_tokens": 12, "seed": 3}
    empty = server.post(prompt="", **body).json()
    assert empty["choices"] == server.post(prompt=[EOS], **body).json()["choices"]
    assert empty["usage"]["prompt_tokens"] == 1
    echoed = server.post(prompt=["", "the"], **body, echo=True, logprobs=0).json()["choices"][0]
    assert echoed["text"] == TOKENIZER.eos_token + empty["choices"][0]["text"]
    assert echoed["logprobs"]["text_offset"][:2] == [0, len(TOKENIZER.eos_token)]


def test_the_end_of_texts_name_is_plain_text_unless_allowed(server: Server) -> None:
    prompt, body = f"the cat{TOKENIZER.eos_token}a dog", {"max_tokens": 3, "seed": 3}
    plain = server.post(prompt=prompt, **body).json()
    assert plain["usage"]["prompt_tokens"] == len(TOKENIZER.encode(prompt))
    ids = [*TOKENIZER.encode("the cat"), EOS, *TOKENIZER.encode("a dog")]
    with running(parse_special=True) as allowing:
        parsed = allowing.post(prompt=prompt, **body).json()
        told = httpx.post(f"{allowing.url}/tokenize", json={"prompt": prompt}).json()
    assert parsed["choices"] == server.post(prompt=ids, **body).json()["choices"]
    assert parsed["usage"]["prompt_tokens"] == told["count"] == len(ids)


def test_a_model_of_gptrays_tells_a_prompt_that_suits_it(server: Server, tmp_path: Path) -> None:
    assert "example_prompt" not in server.get("/v1/models").json()["data"][0]
    save_example(tmp_path, "\uc61b\ub0a0")
    example = load_example(tmp_path)
    assert example
    with running(example_prompt=example.prompt) as own:
        assert own.get("/v1/models/tiny").json()["example_prompt"] == "\uc61b\ub0a0"
    for damaged in ("{", "[]", '{"example_prompt": 3}', '{"example_prompt": ""}'):
        (tmp_path / "gptray.json").write_text(damaged)
        assert load_example(tmp_path) is None


def test_no_answer_has_a_broken_character_unless_the_server_allows_it(server: Server) -> None:
    body = {"prompt": "the cat", "n": 12, "seed": 3, "max_tokens": 30}
    assert "\ufffd" not in server.post(**body).text
    with running(utf8=False) as allowing:
        assert "\ufffd" in allowing.post(**body).text


def test_lm_eval_gets_the_prompts_own_log_probabilities(server: Server) -> None:
    model = tiny()
    prompts = [TOKENIZER.encode("the cat sees a dog"), TOKENIZER.encode("\uc61b\ub0a0")]
    answer = server.post(
        model="tiny", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234
    ).json()
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        logits = model(torch.tensor([ids]))[0, :, : TOKENIZER.vocab_size].log_softmax(-1)
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(told["tokens"]) == len(ids) + 1
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        wanted = [logits[at, token].item() for at, token in enumerate(ids[1:])]
        assert told["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
        # Greedy is told by the same float standing in both places.
        greedy = [at for at in range(len(ids) - 1) if logits[at].argmax() == ids[at + 1]]
        for at, (own, top) in enumerate(
            zip(told["token_logprobs"][1:-1], told["top_logprobs"][1:-1], strict=True)
        ):
            assert (own == max(top.values())) == (at in greedy)
        assert choice["text"].startswith(TOKENIZER.decode(ids))


def test_the_generated_token_is_told_even_if_it_ends_the_text(server: Server) -> None:
    body = {"prompt": [[1, 2, 3]], "max_tokens": 1, "logprobs": 0, "logit_bias": {f"{EOS}": 100}}
    choice = server.post(**body, echo=True).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == TOKENIZER.decode([1, 2, 3])
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert choice["logprobs"]["tokens"][-1] == TOKENIZER.decode([EOS])
    on = server.post(**body, ignore_eos=True).json()["choices"][0]
    assert on["finish_reason"] == "length" and on["text"] == TOKENIZER.decode([EOS])


def test_echo_without_new_tokens_only_scores(server: Server) -> None:
    body = {"prompt": "the cat", "max_tokens": 0, "echo": True}
    answer = server.post(**body, logprobs=2).json()
    assert answer["choices"][0]["text"] == "the cat"
    assert answer["choices"][0]["finish_reason"] == "length"
    told = answer["choices"][0]["logprobs"]
    assert "".join(told["tokens"]) == "the cat" and answer["usage"]["completion_tokens"] == 0
    assert [len(top) in (2, 3) for top in told["top_logprobs"][1:]].count(False) == 0
    assert server.post(**body).json()["choices"][0]["logprobs"] is None


def test_offsets_say_where_in_the_text_each_token_begins(server: Server) -> None:
    body = {"prompt": "the cat \uc61b\ub0a0", "max_tokens": 20, "seed": 1, "logprobs": 0}
    for echo in (False, True):
        choice = server.post(**body, echo=echo).json()["choices"][0]
        told, seen = choice["logprobs"], 0
        assert told["text_offset"] == sorted(told["text_offset"]) and told["text_offset"][0] == 0
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith("token_id:"):
                assert choice["text"][offset : offset + len(token)] == token
                seen += 1
        assert seen > 5


def whole(server: Server, **body: Any) -> dict[str, Any]:
    """The only choice of an answer, put together if it is a stream."""
    answer = server.post(**body)
    if not body["stream"]:
        return dict(answer.json()["choices"][0])
    events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    told = {
        key: [one for part in parts for one in part["logprobs"][key]]
        for key in parts[0]["logprobs"]
    }
    return {"text": "".join(part["text"] for part in parts), "logprobs": told}


def test_an_echoed_prompt_that_stops_within_a_character_goes_on_in_it(server: Server) -> None:
    ids = TOKENIZER.encode("a dog \U0001f600")[:-2]
    body = {"prompt": ids, "echo": True, "seed": 1, "logprobs": 0}
    sampling = Sampling(max_new_tokens=20, seed=1)
    made = Engine(tiny(), TOKENIZER, max_batch_size=1).run([Sequence(ids, sampling)])[0]
    for stream in (False, True):
        choice = whole(server, **body, max_tokens=20, stream=stream)
        assert choice["text"] == TOKENIZER.decode([*ids, *made.tokens])
        told = choice["logprobs"]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert token.startswith("token_id:") or choice["text"][offset:].startswith(token)
    scored = server.post(**body, max_tokens=0).json()["choices"][0]
    assert scored["text"] == TOKENIZER.decode(ids) != choice["text"][: len(scored["text"])]


def test_what_load_clients_send_is_taken(server: Server) -> None:
    body = {
        "model": "tiny", "prompt": "the", "max_tokens": 6, "repetition_penalty": 1.0,
        "logprobs": None, "stop": None, "ignore_eos": True, "stream": True, "suffix": None,
        "top_k": -1, "min_p": 0, "best_of": 1, "user": "me", "add_special_tokens": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).split("\n\n")
    assert events[0] == ": accepted" and events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[1:-2]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-2:] == [6, 6]
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize(
    ("sent", "means"),
    [
        ({"max_tokens": 4.0, "seed": 3.0}, {"max_tokens": 4, "seed": 3}),
        ({"max_tokens": 1000}, {"max_tokens": 64}),
        ({"max_tokens": 1000, "min_tokens": 900}, {"max_tokens": 64, "min_tokens": 64}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"response_format": {"type": "text"}, "tools": [], "unheard_of": None}, {}),
        ({"logitBias": {}, "logit_bias": {}}, {}),
    ],
    ids=str,
)
def test_clients_habits_are_understood(
    server: Server, sent: dict[str, object], means: dict[str, object]
) -> None:
    fixed = {"prompt": "the cat", "seed": 3, "max_tokens": 6}
    answer = server.post(**{**fixed, **sent})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == server.post(**{**fixed, **means}).json()["choices"]
    bom = b"\xef\xbb\xbf" + json.dumps({**fixed, **sent}).encode()
    kind = {"content-type": "application/json"}
    marked = httpx.post(f"{server.url}/v1/completions", content=bom, headers=kind)
    assert marked.json()["choices"] == answer.json()["choices"]


def test_the_servers_limit_on_tokens_cuts_what_is_asked_for() -> None:
    with running(max_output_tokens=3) as limited:
        done = limited.post(prompt="the", max_tokens=50, ignore_eos=True).json()
    assert done["usage"]["completion_tokens"] == 3
    assert done["choices"][0]["finish_reason"] == "length"


def test_tokens_to_and_fro(server: Server) -> None:
    text = "the cat \uc61b\ub0a0"
    url = f"{server.url}/tokenize"
    told = httpx.post(url, json={"prompt": text, "add_special_tokens": False}).json()
    assert told["tokens"] == TOKENIZER.encode(text) and told["count"] == len(told["tokens"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    end = server.get("/tokenizer_info").json()["eos_token"]
    assert end == TOKENIZER.decode([EOS])
    # So does lm-eval ask for its id, to put it before a text.
    assert httpx.post(url, json={"prompt": end}).json()["tokens"] == [EOS]
    assert len(httpx.post(url, json={"prompt": f"a{end}"}).json()["tokens"]) > 2
    too_high = httpx.post(f"{server.url}/detokenize", json={"tokens": [TOKENIZER.vocab_size]})
    assert too_high.status_code == 400


def test_errors_reach_the_openai_package_as_its_own(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="the")
    assert unknown.value.code == "model_not_found"
    assert "The model `gpt-4` does not exist. Served here: tiny." in unknown.value.message
    with pytest.raises(BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="the", extra_body={"max_new_tokens": 5})
    assert "did you mean max_tokens?" in wrong.value.message
    assert wrong.value.param == "max_new_tokens" and wrong.value.type == "invalid_request_error"


def test_key_in_two_forms_counts_once_and_is_never_passed_over() -> None:
    both = {"prompt": "x", "maxTokens": 5, "max_tokens": 4}
    assert parse_request(CompletionRequest, both).max_tokens == 4
    with pytest.raises(ApiError, match=r"unknown key 'maxTokens'; did you mean max_tokens\?"):
        parse_request(CompletionRequest, {**both, "max_tokens": None})


def test_a_prompt_is_read_behind_what_the_tokenizer_puts_before_it() -> None:
    backend = foreign.beginning(foreign.byte_level(), "<|begin|> $A")
    tokenizer = foreign.as_tokenizer(backend)
    text, bos = "the cat", tokenizer.prefix
    ids = tokenizer.encode(text)
    with running(random_gpt(tokenizer), tokenizer=tokenizer) as server:
        body: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 0}
        named, given, bare = (
            server.post(prompt=prompt, **body, **more).json()
            for prompt, more in (
                (text, {}),
                ([*bos, *ids], {}),
                (text, {"add_special_tokens": False}),
            )
        )
        texts = [one["choices"][0]["text"] for one in (named, given, bare)]
        assert texts[0].startswith(text) and texts[1] == f"<|begin|>{texts[0]}"
        assert [one["usage"]["prompt_tokens"] for one in (named, given, bare)] == [
            len(ids) + 1, len(ids) + 1, len(ids)
        ]  # fmt: skip
        told = named["choices"][0]["logprobs"]
        assert told["tokens"][0] == "<|begin|>" and told["token_logprobs"][0] is None
        assert told["text_offset"][:2] == [0, 0]
        assert told["text_offset"][1:] == [
            at - len("<|begin|>") for at in given["choices"][0]["logprobs"]["text_offset"][1:]
        ]
        url = f"{server.url}/tokenize"
        for add, expected in ((True, [*bos, *ids]), (False, ids)):
            asked = {"prompt": text, "add_special_tokens": add}
            assert httpx.post(url, json=asked).json()["tokens"] == expected
        named_token = server.get("/tokenizer_info").json()["bos_token"]
        assert httpx.post(url, json={"prompt": named_token}).json()["tokens"] == bos
        for add, expected in ((True, bos), (False, [])):
            asked = {"prompt": "", "add_special_tokens": add}
            assert httpx.post(url, json=asked).json()["tokens"] == expected


def test_offsets_are_those_of_the_prompt_as_it_was_written() -> None:
    tokenizer = foreign.as_tokenizer(foreign.beginning(foreign.llama(), "<s> $A"))
    body: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 0}
    with running(random_gpt(tokenizer), tokenizer=tokenizer) as server:
        for prompt, begins in (("the cat", [0, 0, 4]), ("<s>the cat", [0, 3, 7])):
            choice = server.post(prompt=prompt, **body).json()["choices"][0]
            told = choice["logprobs"]
            assert told["text_offset"][:3] == begins
            # Decoding takes the space away with which a word's token begins.
            words = ["<s>", "the", "cat"]
            assert told["tokens"][:3] == words and choice["text"].startswith(prompt)
            for word, at in list(zip(words, told["text_offset"], strict=False))[1:]:
                assert choice["text"][at:].lstrip().startswith(word)


@pytest.mark.parametrize("prompt", ["", "the cat", [1], "<s>the cat"])
def test_offsets_of_new_tokens_are_those_of_their_text(prompt: str | list[int]) -> None:
    """A word's token begins with a space, which its name does not show."""
    tokenizer = foreign.as_tokenizer(foreign.beginning(foreign.llama(), "<s> $A"))
    (dog,) = tokenizer.encode("dog")
    body: dict[str, Any] = {"max_tokens": 3, "logit_bias": {str(dog): 100}, "logprobs": 0}
    with running(random_gpt(tokenizer), tokenizer=tokenizer) as server:
        for echo in (True, False):
            choice = server.post(prompt=prompt, echo=echo, **body).json()["choices"][0]
            told = choice["logprobs"]
            assert told["tokens"][-3:] == ["dog"] * 3
            assert all(choice["text"][at:].startswith("dog") for at in told["text_offset"][-3:])
            begins = " dog" if prompt in ("the cat", "<s>the cat") else "dog"
            assert choice["text"].endswith(f"{begins} dog dog"), "a new text begins without a space"


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_left_out_of_the_text_if_asked(stream: bool) -> None:
    tokenizer = foreign.as_tokenizer(foreign.beginning(foreign.byte_level(), "<|begin|> $A"))
    special, (letter,) = tokenizer.prefix[0], tokenizer.encode("a")
    body: dict[str, Any] = {
        "prompt": "the", "max_tokens": 20, "seed": 4, "logprobs": 0, "stream": stream,
        "logit_bias": {str(special): 100, str(letter): 100}, "return_token_ids": True,
    }  # fmt: skip
    with running(random_gpt(tokenizer), tokenizer=tokenizer) as server:
        named = answered(server, **body)
        plain = answered(server, skip_special_tokens=True, **body)
        cut = answered(server, skip_special_tokens=True, stop="aaa", **body)
    ids = named["token_ids"]
    assert plain["token_ids"] == ids and {*ids} == {special, letter}
    assert named["text"].count("<|begin|>") == ids.count(special)
    assert plain["text"] == named["text"].replace("<|begin|>", "") == "a" * ids.count(letter)
    assert (cut["text"], cut["stop_reason"]) == ("", "aaa")
    if not stream:
        offsets = plain["logprobs"]["text_offset"]
        assert offsets == [ids[:at].count(letter) for at in range(len(ids))]
