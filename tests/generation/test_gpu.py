"""What only a GPU shows of generation: kernels, CUDA graphs, and texts that equal a CPU's."""

from __future__ import annotations

import copy
import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gptray.config import Config, RunFailed, override
from gptray.data.tokenizer import Tokenizer
from gptray.generation import gpu_kernels as gpu
from gptray.generation.decoder import Piece, StepRows
from gptray.generation.decoders import make_decoder
from gptray.generation.engine import Engine
from gptray.generation.loading import open_engine
from gptray.generation.philox import uniform
from gptray.generation.product_timing import choose_kernels
from gptray.generation.products import product
from gptray.generation.recording import Graphs
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.adapter_files import load_low_rank
from gptray.model.adapter_folder import open_adapter
from gptray.model.gpt import GPT
from gptray.model.packed_weights import PACKINGS
from gptray.model.quantized import quantize
from tests.generation.adapted import save_base, write_adapter
from tests.generation.models import random_gpt, run, small_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SETTINGS = [
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_k": 200, "top_p": 0.9},
    {"top_p": 0.8, "temperature": 1.3},
    {"temperature": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2, "top_k": 20},
    {"logprobs": 2},
]
# Of GPT-2's network, and of Llama's with all that its families add.
NETWORKS: list[dict[str, Any]] = [
    {},
    {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary", "n_head": 4, "n_kv_head": 2,
     "qk_norm": True, "sliding_window": 90},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def requests_for(tokenizer: Tokenizer, count: int, **settings: object) -> list[Sequence]:
    rng = random.Random(3)
    return [
        Sequence(
            [rng.randrange(1, tokenizer.vocab_size) for _ in range(rng.choice([1, 2, 30, 140]))],
            Sampling(max_new_tokens=20, seed=i, **(settings or SETTINGS[i % len(SETTINGS)])),  # type: ignore[arg-type]
            prompt_logprobs=1 if i % 9 == 8 else None,
        )
        for i in range(count)
    ]


def generated(
    model: GPT, tokenizer: Tokenizer, requests: list[Sequence], backend: str, **options: object
) -> list[Sequence]:
    options = {"max_batch_size": 16} | options
    engine = Engine(model, tokenizer, backend=backend, **options)  # type: ignore[arg-type]
    return run(engine, requests)


def test_random_numbers_are_those_of_a_cpu() -> None:
    seeds = torch.tensor([0, 1, 2**40 + 3, 2**53 - 1, 2**62 + 5] * 40, device="cuda")
    rows = torch.arange(200, device="cuda")
    numbers = gpu.random_numbers(seeds, rows, rows * 7)
    expected = uniform(seeds.tolist(), rows.tolist(), (rows * 7).tolist())
    assert torch.equal(numbers.cpu(), expected)


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
def test_texts_in_fp32_are_those_of_a_cpu(fields: dict[str, Any], tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, n_embd=64, n_positions=200, **fields)
    requests = requests_for(tokenizer, 64)
    expected = generated(model, tokenizer, requests, "torch")
    # With 64 slots a step reads several passes of prompts, with 16 none fills one.
    for backend, slots in (("graph", 16), ("graph", 64), ("torch", 16)):
        there = copy.deepcopy(model).cuda()
        given = generated(there, tokenizer, requests, backend, max_batch_size=slots)
        for one, other in zip(given, expected, strict=True):
            assert one.tokens == other.tokens
            assert one.finish_reason == other.finish_reason
            assert [d.token for d in one.scored] == [d.token for d in other.scored]


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_to_the_bit_those_of_a_row_alone(
    tokenizer: Tokenizer, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    shape: dict[str, Any] = {"n_layer": 3, "n_embd": 56, "n_head": 4, "n_positions": 200} | fields
    model = random_gpt(tokenizer, **shape).cuda()
    prompts = [list(request.prompt) for request in requests_for(tokenizer, 40)]

    def logits_of(prompts: list[list[int]]) -> torch.Tensor:
        decoder = make_decoder("graph", model, 40, dtype)
        pieces = [Piece(i, 0, prompt[:20]) for i, prompt in enumerate(prompts)]
        decoder.step(StepRows([], pieces))
        return decoder.step(StepRows([(5, len(piece.tokens)) for piece in pieces], [])).clone()

    together = logits_of(prompts)
    for i in (0, 7, 39):
        assert torch.equal(logits_of([prompts[i]])[0], together[i])


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
def test_a_text_in_bf16_does_not_depend_on_its_neighbours(
    fields: dict[str, Any], tokenizer: Tokenizer
) -> None:
    model = random_gpt(tokenizer, n_embd=64, n_positions=200, **fields).cuda()
    requests = requests_for(tokenizer, 40)
    together = generated(model, tokenizer, requests, "graph", dtype=torch.bfloat16)
    engine = Engine(model, tokenizer, backend="graph", max_batch_size=16, dtype=torch.bfloat16)
    for request, among in zip(requests[:8], together, strict=False):
        assert run(engine, [request])[0].tokens == among.tokens


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_adapters_have_the_bits_that_each_has_alone(
    tokenizer: Tokenizer, dtype: torch.dtype, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = random_gpt(tokenizer, n_embd=64, n_positions=200, **fields)
    base = save_base(model, tmp_path / "base", tokenizer)
    ranks = {"one": 3, "two": 20}
    for seed, (name, rank) in enumerate(ranks.items()):
        write_adapter(base, tmp_path / name, rank=rank, seed=seed)
    prompts = [list(request.prompt) for request in requests_for(tokenizer, 24)]

    def logits_of(backend: str, model: GPT, rows: list[int]) -> torch.Tensor:
        decoder = make_decoder(backend, model, 24, dtype, takes_adapters=True)
        assert decoder.backend == backend
        each = [
            decoder.pack(load_low_rank(base, open_adapter(tmp_path / name, base))) for name in ranks
        ]
        own = [[*each, None][row % 3] for row in rows]
        pieces = [Piece(i, 0, prompts[row], adapter=own[i]) for i, row in enumerate(rows)]
        decoder.step(StepRows([], pieces))
        asked = [(5, len(piece.tokens)) for piece in pieces]
        return decoder.step(StepRows(asked, [], own)).float().clone()

    on_gpu = copy.deepcopy(model).cuda()
    together = logits_of("graph", on_gpu, list(range(24)))
    for row in (0, 1, 2, 22):
        assert torch.equal(logits_of("graph", on_gpu, [row])[0], together[row])
    if dtype == torch.float32:
        expected = logits_of("torch", model, list(range(24)))
        torch.testing.assert_close(together.cpu(), expected, rtol=0, atol=1e-3)


def test_an_engine_goes_with_its_memory(tokenizer: Tokenizer) -> None:
    model = random_gpt(tokenizer, n_embd=64, n_positions=200).cuda()
    engine = Engine(model, tokenizer, backend="graph", max_batch_size=256)
    run(engine, requests_for(tokenizer, 8))
    held = torch.cuda.memory_allocated()
    gc.disable()  # which does not look at how full a GPU is
    try:
        del engine
        assert torch.cuda.memory_allocated() < held - 2 * 256 * 200 * 64 * 4  # one layer's cache
    finally:
        gc.enable()


def test_too_little_memory_names_the_key_to_lower(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_base(random_gpt(tokenizer, n_embd=64, n_positions=200), tmp_path / "model", tokenizer)
    config = override(Config(), {"compute.use_gpu": True, "generate.max_batch_size": 65536})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        with pytest.raises(RunFailed, match="lower generate.max_batch_size from 65536"):
            open_engine(tmp_path / "model", config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_kernels_for_few_bits_are_measured_once_and_give_what_pytorch_does(
    kind: str,
    dtype: torch.dtype,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    weight, bias = torch.randn(200, 352, device="cuda"), torch.randn(200, device="cuda")
    x = torch.randn(100, 352, device="cuda").to(dtype)
    one = product(weight, bias, dtype, quantized=kind)
    expected = F.linear(x, quantize(weight, kind).dequantize(dtype), bias.to(dtype))
    choose_kernels([one], rows)
    written = {kept: kept.stat().st_mtime_ns for kept in tmp_path.rglob("*.json")}
    choose_kernels([one], rows)
    assert len(written) == (dtype != torch.float32)  # where there is a choice
    assert all(kept.stat().st_mtime_ns == then for kept, then in written.items())
    assert "for quantized weights" not in caplog.text
    for part in (x[:rows], x):
        replayed = Graphs(x.device).recorded(lambda part=part: one(part))  # type: ignore[misc]
        for _ in range(2):
            room = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(replayed(), expected[: len(part)], rtol=0, atol=room)


@pytest.mark.parametrize("kind", PACKINGS)
def test_weights_are_rounded_as_on_a_cpu(kind: str) -> None:
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    there, here = quantize(weight.cuda(), kind), quantize(weight, kind)
    assert torch.equal(there.values.cpu(), here.values)
    assert torch.equal(there.scales.cpu(), here.scales)
