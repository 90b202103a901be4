"""`gptray.LLM`: one model from Python, beside the terminal and the endpoint."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import numpy
import pytest
import torch

import gptray
from gptray import LLM, Output
from gptray.config import Config, RunFailed, SampleConfig, UserError, load_config, override
from gptray.generation.sequence import Sequence
from gptray.generation.settings import numbered_seed
from gptray.jobs.generate.arguments import Options, Settings
from gptray.serving.completions import Completion
from gptray.serving.endpoint import Served
from gptray.serving.protocol import CompletionRequest, parse_request
from tests.jobs.generating import generate

PROMPTS = ["the cat", "a dog", "", "the cat"]
NO_PROMPT: Any = {"text": "the cat"}
NOTHING: Any = None
BYTES: Any = b"the cat"
UNORDERED: Any = {"the cat", "a dog"}
MISSPELT: dict[str, Any] = {"precison": "fp32"}
OTHERS: dict[str, Any] = {"do_sample": True}
SETTINGS: Settings = {"max_new_tokens": 12, "temperature": 1.3, "seed": 5, "top_k": None}


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(model_dir, precision="fp32", max_batch_size=3)


def test_outputs_are_the_terminals_in_the_prompts_order(llm: LLM, model_dir: Path) -> None:
    keys = {f"sample.{name}": value for name, value in SETTINGS.items()}
    keys |= {"sample.prompt": PROMPTS, "generate.precision": "fp32"}
    config = override(Config(), {**keys, "generate.model": str(model_dir)})
    terminal = generate(config)["outputs"]
    outputs = llm.generate(PROMPTS, **SETTINGS)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [
        {
            "prompt": output.prompt,
            "output": output.text,
            "finish_reason": output.finish_reason,
            "output_tokens": len(output.tokens),
            "seed": output.seed,
        }
        for output in outputs
    ] == terminal
    assert len({output.text for output in outputs}) == len(PROMPTS), "draws are independent"


def test_the_endpoint_gives_the_same_text_for_the_same_seed(llm: LLM, model_dir: Path) -> None:
    config = load_config(None, ["generate.precision=fp32"])
    (free,) = llm.generate("the cat", **SETTINGS)
    stops: dict[str, Any] = {
        "stop_token_ids": free.tokens[6:7],
        "include_stop_str_in_output": True,
    }

    async def answer(**more: object) -> str:
        body = {"prompt": "the cat", "max_tokens": 12, "temperature": 1.3, "seed": 5, **more}
        served = Served.load(model_dir, "tiny", config)
        try:
            request = parse_request(CompletionRequest, body)
            completion = await Completion.of(request, served, config.serve)
            with completion.accept(config.serve) as accepted:
                deadline = asyncio.get_running_loop().time() + 60
                parts = [p async for p in completion.run(accepted, deadline, lambda update: None)]
            whole: Any = completion.whole(parts)
            return str(whole["choices"][0]["text"])
        finally:
            served.thread.close()

    settings: dict[str, Any] = {**SETTINGS, **stops}
    (stopped,) = llm.generate("the cat", **settings)
    assert free.text == asyncio.run(answer()) == asyncio.run(answer(prompt=free.prompt_token_ids))
    assert stopped.text == asyncio.run(answer(**stops)) != free.text


def test_a_seed_draws_a_text_again_for_its_prompt_alone(llm: LLM) -> None:
    for output in llm.generate(PROMPTS, **SETTINGS):
        settings: Settings = {**SETTINGS, "seed": output.seed}
        again = llm.generate(output.prompt, **settings)
        assert again == [output]


def test_pieces_of_a_stream_are_the_text_also_beside_others(llm: LLM) -> None:
    (whole,) = llm.generate("the cat", **SETTINGS)
    stream = llm.stream("the cat", **SETTINGS)
    first = next(stream)
    other = llm.generate("a dog", **SETTINGS)
    assert first and "".join([first, *stream]) == whole.text
    assert other == llm.generate("a dog", **SETTINGS)
    left = llm.stream("the cat", **SETTINGS)
    assert isinstance(left, Generator)
    next(left)
    left.close()
    assert llm.generate(["the cat"], **SETTINGS) == [whole]


def test_a_prompt_that_cannot_run_has_its_reason_and_the_others_run(llm: LLM) -> None:
    long, (fine,) = "the cat " * 99, llm.generate("the cat", **SETTINGS)
    first, second = llm.generate(["the cat", long], **SETTINGS)
    assert first == fine
    assert second.finish_reason == "error" and second.error and "too long" in second.error
    assert (second.prompt, second.text, second.seed) == (long, "", numbered_seed(5, 1))
    with pytest.raises(UserError, match="too long"):
        llm.stream(long)
    assert llm.generate([]) == []
    (broken,) = llm.generate(["the \ud800"])
    assert broken.error == "the text holds half a surrogate pair, '\\ud800'"


def test_token_ids_are_prompts_like_the_text_that_they_spell(llm: LLM) -> None:
    texts = ["the cat", "a dog", "the river"]
    expected = llm.generate(texts, **SETTINGS)
    ids = [[*output.prompt_token_ids] for output in expected]
    assert [len(one) for one in ids] == [output.prompt_tokens for output in expected]
    several: list[Any] = [
        ids,
        [numpy.array(ids[0]), torch.tensor(ids[1]), ids[2]],
        [{"prompt_token_ids": ids[0]}, texts[1], tuple(ids[2])],
    ]
    for prompts in several:
        assert llm.generate(prompts, **SETTINGS) == expected
    single: list[Any] = [
        ids[0], torch.tensor(ids[0]), {"prompt_token_ids": ids[0]}, {"prompt": texts[0]},
    ]  # fmt: skip
    for prompt in single:
        assert llm.generate(prompt, **SETTINGS) == expected[:1]
        assert "".join(llm.stream(prompt, **SETTINGS)) == expected[0].text
    wrong = llm.generate([[5, 10**30], [], [0] * 99, ids[2], [-1]], **SETTINGS)
    assert [output.error and output.error[:23] for output in wrong] == [
        "the prompt holds a toke", "the prompt is empty", "the prompt is too long:", None,
        "the prompt holds a toke",
    ]  # fmt: skip
    assert wrong[3].text and not wrong[0].text
    assert (wrong[4].prompt, wrong[4].prompt_token_ids) == ("", [-1])


def test_stop_tokens_and_strings_end_a_text_and_say_so(llm: LLM) -> None:
    (free,) = llm.generate("the cat", **SETTINGS)
    token, stop = free.tokens[5], free.text[3:5]
    at = free.tokens.index(token)
    same: Any = numpy.int64(token)
    for ids in ([token], (same, 0)):
        asked: Settings = {**SETTINGS, "stop_token_ids": ids}
        (cut,) = llm.generate("the cat", **asked)
        assert (cut.tokens, cut.stop_reason) == (free.tokens[:at], token)
        assert cut.finish_reason == "stop" and free.text.startswith(cut.text)
        asked["include_stop_str_in_output"] = True
        assert llm.generate("the cat", **asked)[0].tokens == free.tokens[: at + 1]
    asked = {**SETTINGS, "stop": stop}
    (cut,) = llm.generate("the cat", **asked)
    asked["include_stop_str_in_output"] = True
    (kept,) = llm.generate("the cat", **asked)
    assert kept.text == cut.text + stop == "".join(llm.stream("the cat", **asked))
    assert (free.stop_reason, cut.stop_reason, kept.stop_reason) == (None, stop, stop)


def test_memory_that_ends_names_the_key_to_lower_and_other_calls_go_on(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model_dir, backend="torch", max_batch_size=4)
    expected = llm.generate("the cat", seed=1)

    def ended(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0.")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "softmax", ended)
        with pytest.raises(RunFailed, match=r"lower generate\.max_batch_size from 4, such"):
            llm.generate(["the cat", "a dog"])
    assert llm.generate("the cat", seed=1) == expected


def test_threads_share_the_batch_and_get_their_own_texts(llm: LLM) -> None:
    prompts = [f"{one} {number}" for number in range(4) for one in ("the cat", "a dog")]
    alone = [llm.generate(prompt, **SETTINGS) for prompt in prompts]
    streamed = [["".join(llm.stream(prompt, **SETTINGS))] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(5):
            together = pool.map(lambda prompt: llm.generate(prompt, **SETTINGS), prompts)
            pieces = pool.map(lambda prompt: ["".join(llm.stream(prompt, **SETTINGS))], prompts)
            assert list(together) == alone
            assert list(pieces) == streamed


def test_a_call_is_answered_while_another_threads_prompts_wait(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model_dir, backend="torch", max_batch_size=2)
    softmax, begun = torch.softmax, Event()

    def noticed(*given: Any, **named: Any) -> torch.Tensor:
        begun.set()
        return softmax(*given, **named)

    monkeypatch.setattr(torch, "softmax", noticed)
    ask: Settings = {"max_new_tokens": 40, "min_new_tokens": 40}
    many = Thread(target=lambda: llm.generate(["the cat"] * 30, **ask), daemon=True)
    many.start()
    assert begun.wait(60)
    for _ in range(2):
        llm.generate("a dog", **ask)
    assert many.is_alive()
    many.join(120)


def test_a_step_that_fails_leaves_no_other_thread_waiting(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model_dir, backend="torch", max_batch_size=4)
    prompts, sample = ["the cat", "a dog", "the", "a"], SampleConfig(temperature=0.0)
    expected = {"".join(llm.pieces(one)) for one in llm.start(prompts, sample)}
    softmax, calls, told = torch.softmax, count(), Queue[str]()

    def once(*given: Any, **named: Any) -> torch.Tensor:
        if next(calls):
            return softmax(*given, **named)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0.")

    def read(sequence: Sequence) -> None:
        try:
            told.put("".join(llm.pieces(sequence)))
        except RunFailed as error:
            told.put(str(error))

    monkeypatch.setattr(torch, "softmax", once)
    for one in llm.start(prompts, sample):
        Thread(target=read, args=(one,), daemon=True).start()
    answers = [told.get(timeout=60) for _ in prompts]
    failed = [answer for answer in answers if "generate.max_batch_size" in answer]
    assert len(failed) == 1 and len({*answers} & expected) == 3


def test_a_stream_that_python_collects_during_a_step_is_cancelled(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model_dir, backend="torch", max_batch_size=1)
    expected = llm.generate("the cat", **SETTINGS)
    cycle: list[Any] = [llm.stream("a dog", max_new_tokens=60)]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    softmax, answers = torch.softmax, Queue[list[Output]]()

    def collecting(*given: Any, **named: Any) -> torch.Tensor:
        monkeypatch.setattr(torch, "softmax", softmax)  # collecting once is enough, and slow
        gc.collect()
        return softmax(*given, **named)

    monkeypatch.setattr(torch, "softmax", collecting)
    ask = Thread(target=lambda: answers.put(llm.generate("the cat", **SETTINGS)), daemon=True)
    ask.start()
    assert answers.get(timeout=60) == expected


def test_numbers_of_numpy_are_numbers(llm: LLM) -> None:
    row: Any = {"max_new_tokens": numpy.int64(5), "temperature": numpy.float32(0.5)}
    assert llm.generate("the cat", **row) == llm.generate(
        "the cat", max_new_tokens=5, temperature=0.5
    )


def test_defaults_are_the_configs(llm: LLM) -> None:
    names = SampleConfig.model_fields.keys() - {"prompt"}
    assert Settings.__annotations__.keys() == names
    defaults = {name: getattr(SampleConfig(), name) for name in names}
    assert llm.generate("the cat", **defaults) == llm.generate("the cat")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda llm: llm.generate("a", temprature=1), "temprature; did you mean temperature?"),
        (lambda llm: llm.generate("a", max_tokens=1), "max_tokens; did you mean max_new_tokens?"),
        (lambda llm: llm.stream("a", top_q=1), "unknown keyword top_q"),
        (lambda llm: llm.stream("a", **OTHERS), "unknown keyword do_sample"),
        (lambda llm: llm.generate("a", temperature=-1), "sample.temperature: must be at least 0"),
        (lambda llm: llm.generate("a", top_k="5"), "sample.top_k: expects a whole number or null"),
        (
            lambda llm: llm.generate("a", stop_token_ids=[-1]),
            "sample.stop_token_ids: must be at least 0",
        ),
        (lambda llm: llm.stream("a", stop_token_ids=[5, 999]), "999 is outside the vocabulary, 0"),
        (lambda llm: llm.generate("a", stop_token_ids=5), "sample.stop_token_ids: expects"),
        (lambda llm: llm.generate("a", eos_token_id=5), "eos_token_id; did you mean stop_token_i"),
        (lambda llm: llm.generate(["a", 3]), "prompts[1] must be text or token ids, got int"),
        (lambda llm: llm.generate([[1], [True]]), "prompts[1] must be text or token ids, got list"),
        (
            lambda llm: llm.generate(NO_PROMPT),
            "prompts must have prompt_token_ids or prompt, got [",
        ),
        (
            lambda llm: llm.stream({"prompt_token_ids": NOTHING}),
            "prompts[0] must have prompt_token",
        ),
        (lambda llm: llm.stream({"prompt_token_ids": BYTES}), "[0]['prompt_token_ids'] must be te"),
        (lambda llm: llm.stream([10**6]), "the prompt holds a token outside 0 .. "),
        (lambda llm: llm.stream([-1]), "the prompt holds a token outside 0 .. "),
        (lambda llm: llm.generate(BYTES), "token ids or a list of either, got bytes"),
        (lambda llm: llm.generate(NOTHING), "token ids or a list of either, got NoneType"),
        (lambda llm: llm.generate(bytearray(BYTES)), "or a list of either, got bytearray"),
        (lambda llm: llm.generate([bytearray(BYTES)]), "prompts[0] must be text or token ids, got"),
        (lambda llm: llm.generate(UNORDERED), "token ids or a list of either, got set"),
        (lambda llm: LLM("a", **MISSPELT), "precison; did you mean precision?"),
        (lambda llm: LLM("a", precision="fp16"), "generate.precision: expects auto, fp32 or bf16"),
        (lambda llm: LLM(""), "generate.model: expects text or null, got ''"),
        (lambda llm: LLM("./nowhere"), "generate.model=./nowhere: no such folder"),
    ],
)
def test_a_mistake_names_what_is_wrong_and_the_nearest(
    llm: LLM, wrong: Callable[[LLM], object], said: str
) -> None:
    with pytest.raises(UserError) as mistake:
        wrong(llm)
    assert said in str(mistake.value)
    assert "mean stop?" not in str(mistake.value)  # which do_sample does not mean


FORKING = """
import os, signal, sys
from gptray import LLM, UserError

def opened(): return LLM(sys.argv[1], precision="fp32")

llm = opened()
for use in (lambda: llm.generate("the cat"), lambda: llm.stream("the cat"), opened):
    if not os.fork():
        signal.alarm(60)
        try:
            use()
        except UserError as error:
            print(error)
        sys.exit()
    os.wait()
print(llm.generate("the cat")[0].finish_reason)
"""


def test_a_forked_process_is_told_to_open_its_own_after_a_spawn(model_dir: Path) -> None:
    asked = [sys.executable, "-W", "ignore", "-c", FORKING, str(model_dir)]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert len(told) == 4 and told[3] == "length"
    assert all("multiprocessing's spawn" in line for line in told[:3])


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_llm_says_that_it_cannot_be_pickled(llm: LLM, copied: Callable[[LLM], object]) -> None:
    with pytest.raises(TypeError, match="open one in each process"):
        copied(llm)


def test_a_run_is_opened_by_its_name(model_dir: Path, tmp_path: Path, llm: LLM) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "model").symlink_to(model_dir)
    named = LLM("book", storage_path=str(tmp_path), precision="fp32")
    newest = LLM(storage_path=str(tmp_path), precision="fp32")
    for opened in (named, newest):
        assert opened.generate("the cat", **SETTINGS) == llm.generate("the cat", **SETTINGS)


def test_every_public_name_is_there_and_typed() -> None:
    assert {name for name in gptray.__all__ if getattr(gptray, name, None) is None} == set()
    assert set(gptray.__all__) <= set(dir(gptray))
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        getattr(gptray, "Model")  # noqa: B009
    assert Options.__annotations__.keys() == {
        "storage_path", "precision", "quantize", "use_gpu", "backend", "max_batch_size",
    }  # fmt: skip
    assert Output("a", "b", "length", 1, [2], 3).error is None


def test_a_chat_is_what_its_template_writes(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "talker"
    shutil.copytree(model_dir, folder)
    with pytest.raises(UserError, match="talker has no chat template; call generate"):
        LLM(folder).chat([{"role": "user", "content": "the cat"}])
    template = "{% for one in messages %}{{ one.content }} sees{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    talker = LLM(folder, precision="fp32")
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "a dog")]
    outputs = talker.chat(chats, **SETTINGS)
    assert [output.prompt for output in outputs] == ["the cat sees", "a dog sees"]
    assert outputs == talker.generate(["the cat sees", "a dog sees"], **SETTINGS)
    assert talker.chat(chats[0], **SETTINGS) == outputs[:1]
    with pytest.raises(UserError, match=r"messages\[0\].content must be text"):
        talker.chat([{"role": "user"}])
    wrong: list[Any] = [[], {"role": "user", "content": "the cat"}, "the cat", None]
    for messages in wrong:
        with pytest.raises(UserError, match="^messages expects a list of messages"):
            talker.chat(messages)
