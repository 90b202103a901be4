"""Adapters beside their model: each is asked for by name, and answers as it does alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gptray.config import LoraConfig, load_config
from gptray.model.adapter import Base
from gptray.model.adapter_files import adapted_network, save_adapter
from gptray.model.hf import save_pretrained
from gptray.serving.endpoint import Served
from tests.serving.servers import TOKENIZER, running, served, tiny

GREEDY = {"prompt": "the cat", "max_tokens": 12, "temperature": 0}


def test_a_request_names_the_model_or_one_of_its_adapters() -> None:
    alone = []
    for seed in (0, 1):
        with running(tiny(seed)) as server:
            alone.append(server.post(**GREEDY).json()["choices"][0]["text"])
    assert alone[0] != alone[1]
    with running(tiny(0)) as server:
        adapter = served(tiny(1), server.limits, "tiny:one")
        model = served(tiny(0), server.limits, "tiny", adapters=[adapter])
        server.loop.call_soon_threadsafe(server.endpoint.serve, model)
        names = ["tiny", "tiny:one"] * 4
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda name: server.post(**GREEDY, model=name).json(), names))
        assert [one["choices"][0]["text"] for one in answers] == alone * 4
        assert [one["model"] for one in answers] == names
        assert server.post(**GREEDY).json()["model"] == "tiny"
        assert [one["id"] for one in server.get("/v1/models").json()["data"]] == names[:2]
        assert server.get("/v1/models/tiny:one").json()["id"] == "tiny:one"
        assert server.post(**GREEDY, model="tiny:two").status_code == 404
        assert server.get("/health").status_code == 200
        assert server.metric("gptray_batch_size") == 2 * server.limits.max_batch_size


def test_a_model_is_opened_with_its_adapters(tmp_path: Path) -> None:
    save_pretrained(tiny(0), tmp_path / "base", eos_token_id=TOKENIZER.eos_id)
    TOKENIZER.save(tmp_path / "base")
    base, lora = Base.of(str(tmp_path / "base")), LoraConfig(rank=2)
    network = adapted_network(base, lora, base.config, vocab_size=base.rows, dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.3)
    save_adapter(network, tmp_path / "adapter", base, lora)
    words = [f"serve.adapters={{one: {tmp_path / 'adapter'}}}", "generate.backend=torch"]
    model = Served.load(tmp_path / "base", "base", load_config(None, words))
    try:
        assert [one.name for one in model.all] == ["base", "base:one"]
        assert model.called("base:one") is model.all[1] and model.called(None) is model
    finally:
        model.close()
