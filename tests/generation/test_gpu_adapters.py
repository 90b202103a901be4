"""Adapters in a GPU's passes: kernels by Triton's interpreter or on a GPU, the graphs also without.

TRITON_INTERPRET=1 python -m pytest tests/generation/test_gpu_adapters.py
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import ModelConfig
from gptray.data.tokenizer import Tokenizer
from gptray.generation import gpu_adapters
from gptray.generation import gpu_kernels as gpu
from gptray.generation.adapted_rows import LAYERS, PackedAdapter
from gptray.generation.decoder import Decoder, Piece, StepRows
from gptray.generation.engine import Engine
from gptray.generation.gpu_adapters import GpuAdaptedRows, GpuAdapter, add_low_rank, addresses
from gptray.generation.graphs import FIRST_RANK, GraphDecoder
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.adapter import Base
from gptray.model.adapter_files import LowRank, load_low_rank
from gptray.model.adapter_folder import open_adapter
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained
from tests.generation.adapted import save_base, write_adapter
from tests.generation.models import network, prompt_of, random_gpt, run, small_tokenizer
from tests.generation.test_weight_only import DEVICE, IS_INTERPRETED, needs_kernels, numbers

# The interpreter has no arithmetic in bf16.
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]
SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=4)
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPT2: dict[str, Any] = {"n_embd": 60, "n_head": 4, "n_inner": 96}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_embd": 48, "n_head": 4,
    "n_kv_head": 2, "n_inner": 100, "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=IS_INTERPRETED)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of fewer rows, of which the interpreter takes one after the other."""
    monkeypatch.setattr("gptray.generation.graphs.PROMPT_ROWS", 64)


def adapter_of(rank: int, inputs: int, outputs: int, dtype: torch.dtype) -> GpuAdapter:
    """With random numbers for the second layer of a block, and none for the others."""
    weights = LowRank(
        numbers(rank, inputs, seed=rank) / inputs**0.5, numbers(outputs, rank, seed=rank + 1)
    )
    name = f"transformer.h.0.{LAYERS[1]}.weight"
    return GpuAdapter({name: weights}, SHAPE, dtype, torch.device(DEVICE))


def added(
    y: torch.Tensor, x: torch.Tensor, adapters: list[GpuAdapter | None], slots: list[int] | None
) -> torch.Tensor:
    """A copy of y with what adapters make of x; slots: of a pass with tiles."""
    tiles = None
    if slots:
        starts = [row for row, slot in enumerate(slots) if row % 16 == slots.index(slot) % 16]
        tiles = torch.tensor([*starts, len(slots)], device=DEVICE)
    places = slots or list(range(len(x)))
    named, where = (torch.tensor(of, device=DEVICE) for of in (addresses(adapters), places))
    rows = GpuAdaptedRows(named, where, tiles, room=80)
    y = y.clone()
    for layer in range(4):
        add_low_rank(y, x, layer, rows)
    return y


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 200), (1100, 37)])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_kernels_add_what_their_formula_does(
    dtype: torch.dtype, inputs: int, outputs: int, is_tiled: bool
) -> None:
    few, some, many = (adapter_of(rank, inputs, outputs, dtype) for rank in (1, 16, 70))
    layout = [(few, 3), (None, 1), (many, 18), (some, 1), (many, 2), (None, 2)]
    adapters = [adapter for adapter, count in layout for _ in range(count)]
    slots = [slot for slot, (_, count) in enumerate(layout) for _ in range(count)]
    N = len(slots)
    x, y = numbers(N, inputs).to(dtype), numbers(N, outputs, seed=1).to(dtype)
    given = added(y, x, adapters, slots if is_tiled else None)
    with gpu.formulas():
        expected = added(y, x, adapters, None)
    room = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(given, expected, rtol=room, atol=room)
    plain = [row for row, adapter in enumerate(adapters) if adapter is None]
    assert torch.equal(given[plain], y[plain])
    assert (given != y).any(1).sum() == N - len(plain)
    # To the bit as alone, among rows that are not finite.
    spoilt = torch.full_like(x, float("nan"))
    spoilt[[2, 20]] = x[[2, 20]]
    lone = added(y, spoilt, adapters, slots if is_tiled else None)
    assert torch.equal(lone[[2, 20]], given[[2, 20]])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_network_of_kernels_gives_pytorchs_logits_with_adapters(
    fields: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base = save_base(random_gpt(tokenizer, n_positions=100, **fields), tmp_path / "b", tokenizer)
    model, ids, logits = load_pretrained(base.folder).to(DEVICE), list(range(3, 93)), []
    kinds = {"one": 3, "two": 18}
    for seed, (name, rank) in enumerate(kinds.items()):
        write_adapter(base, tmp_path / name, rank=rank, seed=seed)
    for backend in ("graph", "torch"):
        decoder = network(backend, model, 3, torch.float32)
        assert isinstance(decoder, GraphDecoder if backend == "graph" else Decoder)
        one, two = (
            decoder.pack(load_low_rank(base, open_adapter(tmp_path / name, base))) for name in kinds
        )
        pieces = [Piece(0, 0, ids[:80], adapter=one), Piece(1, 0, ids[:5])]
        first = decoder.step(StepRows([], pieces)).clone()
        more = [Piece(2, 0, ids[:30], adapter=two)]
        asked = [(ids[80], 80), (ids[5], 5)]
        second = decoder.step(StepRows(asked, more, [one, None])).float()
        logits.append(torch.cat((first, second))[:, : tokenizer.vocab_size])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.gpu
@needs_kernels
def test_adapters_kernels_that_are_wrong_here_are_not_used(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(y: torch.Tensor, x: torch.Tensor, layer: int, rows: GpuAdaptedRows) -> None:
        if gpu.kernels_for(x) is None:
            add_low_rank(y, x, layer, rows)

    monkeypatch.setattr(gpu_adapters, "add_low_rank", nothing)
    model = random_gpt(tokenizer, n_positions=100).to(DEVICE)
    assert isinstance(network("graph", model, 2, torch.float32), Decoder)
    assert "the kernels give other numbers than PyTorch" in caplog.text


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Base:
    model = random_gpt(tokenizer, n_positions=200)
    base = save_base(model, tmp_path_factory.mktemp("model") / "base", tokenizer)
    for seed, (name, rank) in enumerate({"one": 2, "two": 5, "wide": FIRST_RANK + 6}.items()):
        write_adapter(base, base.folder.parent / name, rank=rank, seed=seed)
    return base


def test_adapters_come_and_go_while_others_decode(base: Base, tokenizer: Tokenizer) -> None:
    model: GPT = load_pretrained(base.folder).to(HERE)
    engine = Engine(model, tokenizer, max_batch_size=4, backend="graph", takes_adapters=True)
    plain = Engine(model, tokenizer, max_batch_size=4, takes_adapters=True)
    greedy = Sampling(max_new_tokens=12, temperature=0.0, ignore_eos=True, utf8=False)
    prompt = prompt_of(tokenizer, 9, seed=0)
    expected = {}
    for name in ("one", "two", "wide"):
        layers = load_low_rank(base, open_adapter(base.folder.parent / name, base))
        (alone,) = run(plain, [Sequence(prompt, greedy, adapter=plain.pack(layers))])
        expected[name] = alone.tokens
    texts, packed = dict[str, Sequence](), list[weakref.ref[PackedAdapter]]()
    for name in ("one", "wide", "two"):
        adapter = engine.pack(load_low_rank(base, open_adapter(base.folder.parent / name, base)))
        packed.append(weakref.ref(adapter))
        texts[name] = engine.submit(Sequence(prompt, greedy, adapter=adapter))
        engine.submit(Sequence(prompt, greedy))
        for _ in range(3):
            engine.step()
        del adapter
    engine.run([])
    assert {name: text.tokens for name, text in texts.items()} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    texts.clear()
    assert [one() for one in packed] == [None] * 3
