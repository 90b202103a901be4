"""Adapters beside their model: asked for by name, answered as each alone; they come and go."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from gptray.config import load_config
from gptray.generation.loading import pack_adapter
from gptray.model.adapter import Base
from gptray.serving.adapter_watch import AdapterWatch
from gptray.serving.endpoint import Served
from tests.generation.adapted import save_base, write_adapter
from tests.serving.servers import TOKENIZER, Server, running, tiny

NAMES = ("tiny", "tiny:one", "tiny:two")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """With adapters one and two beside its folder."""
    base = save_base(tiny(n_positions=256), tmp_path_factory.mktemp("models") / "base", TOKENIZER)
    for seed, name in enumerate(("one", "two")):
        write_adapter(base, base.folder.parent / name, seed=seed)
    return base


def text(server: Server, name: str | None, tokens: int = 12) -> str:
    body = {"prompt": "the cat", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.post(**body, model=name).json()
    assert answer["model"] == (name or "tiny")
    answered: str = answer["choices"][0]["text"]
    return answered


def told(line: str) -> str:
    answered: str = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return answered


def names_at(server: Server) -> list[str]:
    return [one["id"] for one in server.get("/v1/models").json()["data"]]


def test_a_request_names_the_model_or_one_of_its_adapters(base: Base) -> None:
    with running(tiny(n_positions=256)) as server:
        model = server.endpoint.served
        assert model is not None
        for name in ("one", "two"):
            model.put(name, pack_adapter(model.engine, base, base.folder.parent / name))
        alone = [text(server, name) for name in NAMES]
        assert len(set(alone)) == 3 and text(server, None) == alone[0]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda name: text(server, name), NAMES * 4)) == alone * 4
        assert names_at(server) == list(NAMES)
        assert server.get("/v1/models/tiny:one").json()["id"] == "tiny:one"
        unknown = server.post(prompt="x", model="tiny:three")
        assert unknown.status_code == 404
        assert f"Served here: {', '.join(NAMES)}." in unknown.json()["error"]["message"]
        assert server.get("/health").status_code == 200
        assert server.metric("gptray_batch_size") == server.limits.max_batch_size


def test_requests_end_on_an_adapter_that_has_left(base: Base) -> None:
    with running(tiny(n_positions=256)) as server:
        model = server.endpoint.served
        assert model is not None
        adapter = pack_adapter(model.engine, base, base.folder.parent / "one")
        model.put("one", adapter)
        expected = text(server, "tiny:one", 200)
        body = {"prompt": "the cat", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "model": "tiny:one"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            whole = told(next(lines))
            model.drop("one")
            assert names_at(server) == ["tiny"]
            assert server.post(prompt="x", model="tiny:one").status_code == 404
            whole += "".join(map(told, lines))
        assert whole == expected


def test_adapters_of_a_folder_come_change_and_leave(base: Base, tmp_path: Path) -> None:
    one, two = (base.folder.parent / name for name in ("one", "two"))
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "notes").mkdir()
    shutil.copytree(one, folder / "tales")
    with running(tiny(n_positions=256)) as server:
        model = server.endpoint.served
        assert model is not None
        watch = AdapterWatch(folder, model, base)
        assert watch.scan() == ["tiny:tales is served"]
        assert watch.scan() == [] and names_at(server) == ["tiny", "tiny:tales"]
        first = text(server, "tiny:tales")
        # A new one may be on its way: it is taken when it is still.
        shutil.copytree(two, folder / "news")
        assert watch.scan() == []
        assert watch.scan() == ["tiny:news is served"]
        (folder / "news" / "adapter_config.json").write_text("{}")
        watch.scan()
        (line,) = watch.scan()
        assert line.startswith("tiny:news is not served: ") and line.endswith(
            "the previous one stays"
        )
        assert watch.scan() == [] and "\n" not in line
        assert names_at(server) == ["tiny", "tiny:news", "tiny:tales"]
        shutil.copy(two / "adapter_model.safetensors", folder / "tales")
        watch.scan()
        assert watch.scan() == ["tiny:tales is served"]
        assert text(server, "tiny:tales") != first
        shutil.rmtree(folder / "tales")
        shutil.rmtree(folder / "news")
        assert watch.scan() == ["tiny:news is no longer served", "tiny:tales is no longer served"]
        assert names_at(server) == ["tiny"]
        shutil.rmtree(folder)
        (line,) = watch.scan()
        assert line.startswith(f"serve.adapters={folder}: ") and watch.scan() == []


def test_an_adapter_that_finds_no_memory_leaves_the_others_served(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base.folder.parent / "one", tmp_path / "tales")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has no room. Try something."
        )

    with running(tiny(n_positions=256)) as server:
        model = server.endpoint.served
        assert model is not None
        watch, slots = AdapterWatch(tmp_path, model, base), server.limits.max_batch_size
        with monkeypatch.context() as patched:
            patched.setattr(torch, "cat", full)
            (line,) = watch.scan()
        assert line.startswith(
            "tiny:tales is not served: the GPU is out of memory (Tried to allocate 2.00 MiB. "
            f"GPU 0 has no room); lower serve.max_batch_size from {slots}"
        )
        assert watch.scan() == [] and names_at(server) == ["tiny"]


@pytest.mark.parametrize("given", ["{{one: {0}}}", "{1}"])
def test_a_model_is_opened_with_the_adapters_that_are_named(base: Base, given: str) -> None:
    folder = base.folder.parent
    given = given.format(folder / "one", folder)
    words = [f"serve.adapters={given}", "generate.backend=torch"]
    model = Served.load(base.folder, "tiny", load_config(None, words))
    try:
        named = ["tiny:one"] if "{" in given else []
        assert [one.name for one in model.all] == ["tiny", *named]
        assert model.called(None) is model and model.called("tiny:x") is model
    finally:
        model.close()
