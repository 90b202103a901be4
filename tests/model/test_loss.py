"""The head in chunks: many chunks equal one, and none is larger than its device likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model import loss as module
from gptray.model.gpt import GPT
from gptray.model.loss import (
    GPU_BYTES,
    IGNORED,
    chunk_rows,
    fused_scores,
    linear_cross_entropy,
    scores,
    token_cross_entropy,
)


@pytest.mark.parametrize("vocab_size", [1, 65, 2048, 50257, 50304, 128_000, 2**24, 2**27])
def test_logits_of_a_piece_stay_far_below_256_mb_on_a_cpu(vocab_size: int) -> None:
    rows = chunk_rows(10**9, vocab_size, on_gpu=False)
    assert rows >= 1
    copies = 4 + 2 + 2  # fp32, and bf16 of the logits and of their gradient
    assert rows == 1 or rows * vocab_size * copies <= 128 * 2**20


@pytest.mark.parametrize(
    ("rows", "vocab_size", "logit_bytes", "chunks"),
    [
        (12 * 1024, 50304, 2, 1),
        (12 * 1024, 50304, 4, 2),
        (32 * 1024, 50304, 2, 2),
        (32 * 1024, 50257, 4, 4),
        (7, 65, 4, 1),
        (5, 2**30, 4, 5),
    ],
)
def test_a_gpus_pieces_are_few_and_alike(
    rows: int, vocab_size: int, logit_bytes: int, chunks: int
) -> None:
    size = chunk_rows(rows, vocab_size, on_gpu=True, logit_bytes=logit_bytes)
    assert -(-rows // size) == chunks
    assert size == 1 or size * vocab_size * logit_bytes <= GPU_BYTES
    last = rows - (chunks - 1) * size
    assert size - last < 32


@pytest.mark.slow
def test_a_compiled_step_on_a_gpu_is_a_small_graph() -> None:
    """Meta tensors take a GPU's ways: a chunk's logits are few formulas, without a scatter."""
    torch.compiler.reset()  # what it has compiled before would have sizes that may vary
    with torch.device("meta"):
        config = ModelConfig(n_layer=1, n_head=12, n_embd=768, n_positions=1024, vocab_size=50304)
        model = GPT(config, vocab_size=50257)
        batch = torch.zeros(12, 1024, dtype=torch.int64)
    model.compute_dtype = torch.bfloat16
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    torch.compile(model, backend=aot_autograd(fw_compiler=keep))(batch, batch).backward()
    calls = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    assert len(graphs) == 2 and len(calls) < 250
    of_logits = [
        node
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and getattr(node.meta.get("val"), "shape", ())[-1:] == (50304,)
        and len(node.meta["val"].shape) == 2
    ]
    assert 0 < len(of_logits) < 16
    assert not [call for call in calls if "scatter" in call or "index_put" in call]


@pytest.mark.parametrize("valid", [29, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_compiled_formulas_equal_the_others(valid: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 16, generator=generator).to(dtype)
    x = torch.randn(40, 16, generator=generator).to(dtype)
    target = torch.randint(29, (40, 1), generator=generator)
    for ours, theirs in zip(
        fused_scores(x, weight, target, valid), scores(x, weight, target, valid), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 13, 40])
@pytest.mark.parametrize("uncounted", [[], [0, 7, 8, 39]])
def test_pieces_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, uncounted: list[int]
) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda *_, **__: rows)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 16, generator=generator, requires_grad=True)
    x = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(29, (40,), generator=generator)
    every = F.cross_entropy(F.linear(x.float(), weight.to(dtype).float())[:, :29], targets)
    tokens = token_cross_entropy(x, weight, targets, valid=29)
    targets[uncounted] = IGNORED
    loss = linear_cross_entropy(x, weight, targets, valid=29)
    logits = F.linear(x.float(), weight.to(dtype).float())[:, :29]
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (5e-3, 3e-2)
    torch.testing.assert_close(loss, expected, atol=atol, rtol=rtol)
    torch.testing.assert_close(tokens.mean(), every, atol=atol, rtol=rtol)
    with torch.no_grad():
        same = linear_cross_entropy(x, weight, targets, valid=29)
    torch.testing.assert_close(same, expected, atol=atol, rtol=rtol)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (x, weight)),
        torch.autograd.grad(3 * expected, (x, weight)),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def test_a_second_backward_pass_is_refused() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(3, 4), weight, torch.tensor([0, 1, 2]), valid=5)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
