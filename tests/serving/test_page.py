"""The page in a real browser: type, generate, look at candidates, stop, be told of an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gptray.generation.engine import Engine
from gptray.generation.loading import pack_adapter
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.serving.api_keys import Keys, read_keys
from tests.generation.adapted import save_base, write_adapter
from tests.serving.browser import Tab, chromium, needs_chromium
from tests.serving.servers import TOKENIZER, Server, running, tiny

pytestmark = needs_chromium
OUTPUT = "document.querySelector('#output').textContent"
IDLE = "!document.querySelector('#generate').disabled"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(tiny(n_positions=4096), max_output_tokens=2000) as server:
        yield server


def fill(tab: Tab, **fields: str) -> None:
    for name, value in fields.items():
        tab.run(f"document.querySelector('#{name}').select()")
        tab.write(value)


def text(tab: Tab, selector: str) -> str:
    found: str = tab.run(f"document.querySelector('{selector}').textContent")
    return found


def test_typed_by_keyboard_the_text_streams_with_its_candidates(tab: Tab, server: Server) -> None:
    tab.open(server.url)
    tab.until("document.title === 'tiny'")
    prompt = "the \uc61b\ub0a0 "
    fill(tab, prompt=prompt, temperature="0.9", top_k="5", max_tokens="12", seed="3")
    tab.run("document.querySelector('#prompt').focus()")
    tab.press("Enter", code=13, modifiers=2)
    tab.until(f"document.querySelectorAll('.token').length > 0 && {IDLE}")
    engine = Engine(tiny(n_positions=4096), TOKENIZER, max_batch_size=1)
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_k=5, seed=3)
    written = engine.run([Sequence(TOKENIZER.encode(prompt), sampling)])[0]
    assert tab.run(OUTPUT) == prompt + written.text
    assert "12 tokens" in text(tab, "#speed") and "tokens/s" in text(tab, "#speed")
    tab.run("document.querySelector('.token').focus()")
    tab.press("ArrowRight", code=39)
    tab.press("ArrowRight", code=39)
    chosen = tab.run("[...document.querySelectorAll('.token')].findIndex((t) => t.ariaCurrent)")
    assert chosen == 2
    numbers = "[...document.querySelectorAll('#likeliest .number')].map((n) => n.textContent)"
    shares = [float(number.removesuffix(" %")) for number in tab.run(numbers)]
    assert len(shares) in (8, 9) and shares[:8] == sorted(shares[:8], reverse=True)
    assert 0 < sum(shares) < 100.1
    assert tab.run("document.querySelectorAll('#likeliest tr.drawn').length") == 1
    assert tab.complaints == []


def test_stop_ends_the_text_and_frees_the_slot(tab: Tab, server: Server) -> None:
    tab.open(server.url)
    for how in ("document.querySelector('#stop').click()", None):
        fill(tab, prompt="the", max_tokens="2000")
        tab.run("document.querySelector('#generate').click()")
        tab.until("document.querySelectorAll('.token').length > 5")
        if how:
            tab.run(how)
        else:
            tab.press("Escape", code=27)
        tab.until(IDLE)
        assert tab.run("document.querySelectorAll('.token').length") < 2000
        assert tab.run("document.querySelector('#error').hidden")
        while server.metric("gptray_sequences_running"):
            pass


def test_an_error_is_shown_as_the_server_words_it(tab: Tab, server: Server) -> None:
    tab.open(server.url)
    prompt = "the " * 5000
    fill(tab, prompt=prompt, max_tokens="1")
    tab.run("document.querySelector('#generate').click()")
    tab.until("!document.querySelector('#error').hidden")
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert answer.status_code == 400
    assert text(tab, "#error") == answer.json()["error"]["message"]
    assert tab.run(IDLE)


def test_it_fits_a_phone_and_the_dark(tab: Tab, server: Server) -> None:
    tab.complaints.clear()
    tab.open(server.url, width=360, dark=True)
    fill(tab, prompt="the " * 20, max_tokens="30")
    tab.run("document.querySelector('#generate').click()")
    tab.until(f"document.querySelectorAll('.token').length > 0 && {IDLE}")
    tab.run("document.querySelector('.token').click()")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("document.querySelector('#generate').getBoundingClientRect().height >= 44")
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(21, 24, 28)"
    assert tab.complaints == []


def test_the_first_prompt_is_the_models_own(tab: Tab, server: Server) -> None:
    with running(example_prompt="\uc61b\ub0a0 \uc61b\uc801\uc5d0") as own:
        tab.open(own.url)
        tab.until("document.title === 'tiny'")
        assert (
            tab.run("document.querySelector('#prompt').value") == "\uc61b\ub0a0 \uc61b\uc801\uc5d0"
        )
    tab.open(server.url)
    tab.until("document.title === 'tiny'")
    assert tab.run("document.querySelector('#prompt').value") == "Once upon a time"


def test_it_offers_the_adapters(tab: Tab, server: Server, tmp_path: Path) -> None:
    tab.open(server.url)
    tab.until("document.title === 'tiny'")
    assert tab.run("document.querySelector('#choice').hidden")
    base = save_base(tiny(), tmp_path / "base", TOKENIZER)
    write_adapter(base, tmp_path / "one")
    with running(tiny()) as adapted:
        model = adapted.endpoint.served
        assert model is not None
        model.put("one", pack_adapter(model.engine, base, tmp_path / "one"))
        tab.open(adapted.url, width=360)
        tab.until("document.querySelectorAll('#name option').length === 2")
        assert not tab.run("document.querySelector('#choice').hidden")
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        texts = {}
        for name in ("tiny", "tiny:one"):
            tab.run(f"document.querySelector('#name').value = '{name}'")
            fill(tab, prompt="the cat", temperature="0", max_tokens="12")
            tab.run("document.querySelector('#generate').click()")
            tab.until(f"document.querySelectorAll('.token').length > 0 && {IDLE}")
            texts[name] = tab.run(OUTPUT)
            body = {"prompt": "the cat", "temperature": 0, "max_tokens": 12, "model": name}
            answer = adapted.post(**body).json()["choices"][0]["text"]
            assert texts[name] == "the cat" + answer
        assert len({*texts.values()}) == 2


def test_it_asks_for_the_key(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("opensesame")
    path = str(tmp_path / "key")
    with running(keys=Keys(path, read_keys(path))) as server:
        tab.open(server.url)
        tab.until("!document.querySelector('#key-field').hidden")
        fill(tab, prompt="the", key="opensesame", max_tokens="5")
        tab.run("document.querySelector('#generate').click()")
        tab.until(f"document.querySelectorAll('.token').length > 0 && {IDLE}")
        assert len(tab.run(OUTPUT)) > 3


def test_it_needs_nothing_from_elsewhere(server: Server) -> None:
    html = server.get("/").text
    assert "http://" not in html and "https://" not in html and "src=" not in html
