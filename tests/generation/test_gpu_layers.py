"""Triton's kernels for a network's layers: by Triton's interpreter on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/generation/test_gpu_layers.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptray.config import ModelConfig
from gptray.generation import gpu_kernels as gpu
from gptray.generation.decoder import Decoder, Piece, StepRows
from gptray.generation.engine import Engine
from gptray.generation.graphs import GraphDecoder
from gptray.generation.queries import Queries
from gptray.model.rotary import Rotary
from tests.generation.models import network, random_gpt, small_tokenizer
from tests.generation.test_weight_only import DEVICE, IS_INTERPRETED, needs_kernels, numbers

pytestmark = [pytest.mark.gpu, needs_kernels]
# The interpreter has no arithmetic in bf16.
DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]
MIXES: list[dict[str, Any]] = [
    {},
    {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary", "n_kv_head": 2, "qk_norm": True},
    {"positions": "rotary", "partial_rotary_factor": 0.5, "parallel_residual": True},
    {"positions": "rotary", "sliding_window": 70, "n_kv_head": 1, "head_dim": 12},
    {"positions": "rotary", "norm": "rmsnorm", "qk_norm": True, "wide_qk_norm": True,
     "mlp": "geglu", "centred_norm": True, "sandwich_norm": True, "scale_embedding": True},
    {"positions": "rotary", "n_kv_head": 2, "qk_norm": True, "wide_qk_norm": True,
     "no_rope_layers": [1, 0]},
    {"positions": "rotary", "local_rope_theta": 100.0, "sliding_window": 70,
     "layer_types": ["sliding_attention", "full_attention"]},
]  # fmt: skip


@pytest.fixture(autouse=IS_INTERPRETED)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of fewer rows, of which the interpreter takes one after the other."""
    monkeypatch.setattr("gptray.generation.graphs.PROMPT_ROWS", 64)


def room(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kind", "window"),
    [
        ((2, 2, 16), "plain", None),
        ((5, 5, 7), "plain", 70),
        ((9, 3, 64), "rotated", None),
        ((4, 1, 20), "both", 5),
        ((3, 1, 8), "normed", 1),
        ((3, 1, 256), "plain", None),
    ],
)
@pytest.mark.parametrize("is_tiled", [False, True])
def test_attention_is_its_formula(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, kind: str, is_tiled: bool
) -> None:
    # heads: n_head, kv_heads, head width
    (H, K, E), P, N = heads, 140, 40
    part = E // 4 * 2  # of a head is rotated
    norms = numbers(2 * E, seed=5).to(dtype) if kind in ("normed", "both") else None
    queries = Queries(H, K, E, norms, 1e-5)
    layout = [(0, 8), (P - 4, 4), (0, 1), (70, 17), (30, 3)]  # starts and counts, by slot
    slots, positions, tiles = list[int](), list[int](), list[int]()
    for slot, (start, count) in enumerate(layout):
        tiles += range(len(slots), len(slots) + count, gpu.TILE_ROWS)
        slots += [slot] * count
        positions += range(start, start + count)
    padding = N - len(slots)
    rows = [slots + [len(layout)] * padding, positions + [0] * padding, [*tiles, N, N]]
    slot_of, position_of, first_rows = (torch.tensor(row, device=DEVICE) for row in rows)
    angles = None
    if kind in ("rotated", "both"):
        shape = ModelConfig(positions="rotary", n_head=1, n_embd=part, n_positions=P)
        (angles, *_) = Rotary(shape).at(position_of, dtype)
    qkv = (numbers(N, (H + 2 * K) * E) / E**0.25).to(dtype)
    caches = [numbers(len(layout) + 1, K, P, E, seed=seed).to(dtype) for seed in (1, 2)]
    others = [cache.clone() for cache in caches]

    def attended(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return gpu.attend(
            qkv,
            queries,
            angles,
            keys,
            values,
            slot_of,
            position_of,
            window=window,
            tiles=first_rows if is_tiled else None,
        )

    given = attended(*caches)
    with gpu.formulas():
        expected = attended(*others)
    for cache, other in zip(caches, others, strict=True):
        torch.testing.assert_close(cache[:-1], other[:-1], rtol=room(dtype), atol=room(dtype))
    torch.testing.assert_close(given, expected, rtol=room(dtype), atol=room(dtype))
    assert not given[len(slots) :].any()


def decoded(
    heads: tuple[int, int, int], lengths: list[int], P: int, dtype: torch.dtype, window: int
) -> torch.Tensor:
    """What rows of these lengths, one a slot, attend to in a cache of P positions; then padding."""
    (H, K, E), N = heads, len(lengths)
    qkv = [numbers((H + 2 * K) * E, seed=length) / E**0.25 for length in [*lengths, 0]]
    caches = torch.zeros(2, N + 1, K, P, E, device=DEVICE, dtype=dtype)
    for slot, length in enumerate(lengths):
        caches[:, slot, :, :length] = numbers(2, K, length, E, seed=length).to(dtype)
    slots, positions = torch.arange(N + 1), torch.tensor([*lengths, 1]) - 1
    keys, values = caches
    return gpu.attend(
        torch.stack(qkv).to(dtype),
        Queries(H, K, E),
        None,
        keys,
        values,
        slots.to(DEVICE),
        positions.to(DEVICE),
        window=window,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "window"),
    [
        ((2, 2, 64), 9999),
        ((4, 2, 128), 300),
        ((4, 1, 96), 9999),
        ((8, 1, 64), 256),
        ((3, 1, 256), 257),
        ((34, 1, 256), 1),
    ],
)
def test_long_rows_are_read_in_chunks(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int
) -> None:
    # 16 chunks are merged at a time.
    lengths = [1, 4097, 255, 256, 257, 3000, 511, 512, 4096, 513]
    if heads[0] > 30:
        lengths = lengths[:5]
    given = decoded(heads, lengths, 4200, dtype, window)
    with gpu.formulas():
        expected = decoded(heads, lengths, 4200, dtype, window)
    torch.testing.assert_close(given, expected, rtol=room(dtype), atol=room(dtype))
    assert not given[-1].any()
    # To the bit as in a cache with less room, whatever other rows there are.
    alone = decoded(heads, [257], 300, dtype, window)
    assert torch.equal(alone[0], given[lengths.index(257)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 64, 1500])
def test_norms_and_gates_are_their_formulas(dtype: torch.dtype, width: int) -> None:
    x, weight = numbers(5, 2 * width).to(dtype), numbers(2 * width, seed=1).to(dtype)

    def computed() -> list[torch.Tensor]:
        return [gpu.rms_norm(x, weight, 1e-5), gpu.gated(x, "swiglu"), gpu.gated(x, "geglu")]

    given = computed()
    with gpu.formulas():
        torch.testing.assert_close(given, computed(), rtol=room(dtype), atol=room(dtype))


@pytest.mark.parametrize("fields", MIXES, ids=str)
@torch.no_grad()
def test_a_network_of_kernels_gives_pytorchs_logits(fields: dict[str, Any]) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, n_head=4, n_positions=100, **fields).to(DEVICE)
    ids = list(range(3, 93))
    logits = []
    for backend in ("graph", "torch"):
        decoder = network(backend, model, 3, torch.float32)
        assert isinstance(decoder, GraphDecoder if backend == "graph" else Decoder)
        first = decoder.step(StepRows([], [Piece(0, 0, ids[:80]), Piece(1, 0, ids[:5])])).clone()
        second = decoder.step(
            StepRows([(ids[80], 80), (ids[5], 5)], [Piece(2, 0, ids[:30])])
        ).float()
        logits.append(torch.cat((first, second))[:, : tokenizer.vocab_size])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def wrong_gates(x: torch.Tensor, kind: str) -> torch.Tensor:
    return GATED(x, kind) * (1 if gpu.kernels_for(x) is None else 2)


def wrong_later_chunks(qkv: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    made, positions = ATTEND(qkv, *given, **named), given[5]
    wrong = 0 if gpu.kernels_for(qkv) is None else positions[:, None] >= gpu.CHUNK_KEYS
    return made * (1 + wrong)


def wrong_draws(*asked: torch.Tensor) -> torch.Tensor:
    return DRAWS(*asked) / (1 if gpu.kernels_for(asked[0]) is None else 2)


def no_draws(*asked: torch.Tensor) -> torch.Tensor:
    if gpu.kernels_for(asked[0]):
        raise ValueError("at 3:5:\n    bits = lost\n    ^\nlost is not defined")
    return DRAWS(*asked)


GATED, ATTEND, DRAWS = gpu.gated, gpu.attend, gpu.random_numbers
DIFFERENT = "the kernels give other numbers than PyTorch on this GPU"


@pytest.mark.parametrize(
    ("name", "wrong", "why"),
    [
        ("gated", wrong_gates, DIFFERENT),
        ("attend", wrong_later_chunks, DIFFERENT),
        ("random_numbers", wrong_draws, "the kernels draw other random numbers than PyTorch"),
        ("random_numbers", no_draws, "ValueError: lost is not defined"),
    ],
)
def test_kernels_that_are_wrong_here_are_not_used(
    name: str,
    wrong: Any,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gpu, name, wrong)
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, mlp="swiglu", n_positions=500).to(DEVICE)
    assert Engine(model, tokenizer, max_batch_size=2, backend="graph").backend == "torch"
    (told,) = caplog.messages
    assert told.startswith(f"generating without CUDA graphs, which is slower: {why}")
    assert "\n" not in told
