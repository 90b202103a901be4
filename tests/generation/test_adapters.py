"""Adapters beside their base in one engine: what each row gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptray.config import LoraConfig, UserError
from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.decoder import Network, Piece, StepRows
from gptray.generation.decoders import make_decoder
from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.adapter import Base
from gptray.model.adapter_files import adapted_network, load_low_rank, load_merged
from gptray.model.adapter_folder import open_adapter
from gptray.model.hf import load_pretrained
from tests.generation.adapted import save_base, write_adapter
from tests.generation.models import (
    BACKENDS,
    needs_native,
    network,
    prompt_of,
    random_gpt,
    run,
    small_tokenizer,
)
from tests.model.damaged_adapters import edit_config, edit_weights

GPT2: dict[str, Any] = {"n_embd": 60, "n_head": 4, "n_inner": 96}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_embd": 48, "n_head": 4,
    "n_kv_head": 2, "n_inner": 100, "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False,
}  # fmt: skip
GRANITE = LLAMA | {
    "attention_scale": 0.5, "residual_multiplier": 0.3, "embedding_multiplier": 5.0,
    "logits_scaling": 2.0,
}  # fmt: skip
KINDS = [
    ("torch", torch.float32, "none"),
    ("torch", torch.bfloat16, "none"),
    ("torch", torch.bfloat16, "int8"),
    ("graph", torch.float32, "none"),
    ("graph", torch.bfloat16, "none"),
    ("graph", torch.bfloat16, "int8"),
    pytest.param("native", torch.float32, "none", marks=needs_native),
    pytest.param("native", torch.bfloat16, "none", marks=needs_native),
    pytest.param("native", torch.bfloat16, "int8", marks=needs_native),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module", params=[GPT2, LLAMA, GRANITE], ids=["gpt2", "llama", "granite"])
def base(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Base:
    """With adapters one and two, of other ranks and layers, and one whose blocks differ in rank."""
    model = random_gpt(tokenizer, initializer_range=0.2, n_positions=200, **request.param)
    base = save_base(model, tmp_path_factory.mktemp("model") / "base", tokenizer)
    queries = "c_attn" if request.param is GPT2 else "q_proj"
    write_adapter(base, adapter_of(base, "one"), rank=3, seed=1)
    write_adapter(base, adapter_of(base, "two"), rank=8, seed=2, targets=[queries])
    write_adapter(base, adapter_of(base, "mixed"), rank=5, seed=3)
    second = r".*\.1\..*"
    edit_config(rank_pattern={second: 2}, alpha_pattern={second: 7})(adapter_of(base, "mixed"))
    edit_weights(narrow_second_block)(adapter_of(base, "mixed"))
    return base


def narrow_second_block(weights: dict[str, Tensor]) -> None:
    """Leave the second block's matrices rank 2."""
    for name, weight in weights.items():
        if ".1." in name:
            weights[name] = (weight[:2] if "lora_A" in name else weight[:, :2]).contiguous()


def adapter_of(base: Base, name: str) -> Path:
    return base.folder.parent / name


def packed(decoder: Network | Engine, base: Base, name: str | None) -> PackedAdapter | None:
    if name is None:
        return None
    return decoder.pack(load_low_rank(base, open_adapter(adapter_of(base, name), base)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["one", "two", "mixed"])
def test_an_adapter_gives_the_merged_models_logits(
    base: Base, tokenizer: Tokenizer, backend: str, name: str
) -> None:
    ids = prompt_of(tokenizer, 40, seed=1)
    merged = load_merged(base, open_adapter(adapter_of(base, name), base)).eval()
    with torch.no_grad():
        expected = merged(torch.tensor([ids]))[0, :, : tokenizer.vocab_size]
    decoder = network(backend, load_pretrained(base.folder), 1, torch.float32)
    adapter = packed(decoder, base, name)
    logits = decoder.step(
        StepRows([], [Piece(0, 0, ids[:-1], scored=True, adapter=adapter)])
    ).clone()
    last = decoder.step(StepRows([(ids[-1], 39)], [], adapters=[adapter]))
    found = torch.cat((logits, last))[:, : tokenizer.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounded", ["none", "int8"])
def test_a_model_whose_adapter_is_in_training_is_decoded(
    base: Base, tokenizer: Tokenizer, backend: str, rounded: str
) -> None:
    base, ids = replace(base, quantized=rounded), prompt_of(tokenizer, 40, seed=1)
    model = adapted_network(
        base, LoraConfig(rank=3), base.config, vocab_size=tokenizer.vocab_size, dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        expected = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size]
    decoder = make_decoder(backend, model, 1, torch.float32, "none")
    found = decoder.step(StepRows([], [Piece(0, 0, ids, scored=True)]))[:, : tokenizer.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("backend", "dtype", "quantize"), KINDS)
def test_two_adapters_and_the_base_in_one_batch_have_the_bits_that_each_has_alone(
    base: Base, tokenizer: Tokenizer, backend: str, dtype: torch.dtype, quantize: str
) -> None:
    decoder = network(backend, load_pretrained(base.folder), 6, dtype, quantize)
    each = [packed(decoder, base, name) for name in ("one", None, "two")] * 2
    prompts = [prompt_of(tokenizer, length, seed=length) for length in (3, 17, 64, 65, 30, 29)]

    def logits_of(rows: Many[int]) -> Tensor:
        """After each prompt, and after one token more."""
        pieces = [Piece(slot, 0, prompts[row], adapter=each[row]) for slot, row in enumerate(rows)]
        first = decoder.step(StepRows([], pieces)).clone()
        decoding = [(7, len(prompts[row])) for row in rows]
        return torch.cat(
            (first, decoder.step(StepRows(decoding, [], adapters=[each[row] for row in rows])))
        )

    together = logits_of(range(6)).view(2, 6, -1)
    for row in range(6):
        assert torch.equal(together[:, row], logits_of([row])[:, :]), row
    plain = decoder.step(StepRows([], [Piece(0, 0, prompts[0])]))
    assert not torch.equal(plain[0], together[0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_of_many_adapters_are_those_of_each_alone(
    base: Base, tokenizer: Tokenizer, backend: str
) -> None:
    model = load_pretrained(base.folder)
    engine = Engine(model, tokenizer, max_batch_size=4, backend=backend, takes_adapters=True)
    each = [packed(engine, base, name) for name in ("one", "two", None)]
    sampling = Sampling(max_new_tokens=12, temperature=0.7, utf8=False)
    asked = [
        Sequence(prompt_of(tokenizer, 5 + row, seed=row % 3), sampling, adapter=each[row % 3])
        for row in range(12)
    ]
    together = [one.tokens for one in run(engine, asked)]
    assert together == [run(engine, [one])[0].tokens for one in asked]
    assert together != [
        one.tokens for one in run(engine, [replace(one, adapter=None) for one in asked])
    ]


def test_an_adapter_that_replaces_weights_cannot_run_beside_its_base(
    base: Base, tmp_path: Path
) -> None:
    write_adapter(base, tmp_path / "norms", train=["norms"])
    adapter = open_adapter(tmp_path / "norms", base)
    with pytest.raises(UserError, match=r"norms: it replaces weights of its base \(.*ln|norm"):
        load_low_rank(base, adapter)
