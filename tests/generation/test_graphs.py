"""What a step asks of a GPU and its host, seen without a GPU by the operators that PyTorch runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptray.config import ModelConfig
from gptray.generation import sequence as texts
from gptray.generation.decoder import StepRows
from gptray.generation.engine import Engine
from gptray.generation.settings import Sampling
from gptray.model.adapter_files import load_low_rank
from gptray.model.adapter_folder import open_adapter
from gptray.model.gpt import GPT
from gptray.model.hf import load_pretrained
from tests.generation.adapted import save_base, write_adapter
from tests.generation.models import network, prompt_of, random_gpt, run, small_tokenizer

Call = tuple[torch._ops.OpOverload, Sequence[Any]]
# A cast, which a compiler fuses into what reads it, as it does all that works number by number; and
# what is a view in all but name.
NO_KERNELS = (torch.ops.aten._to_copy.default, torch.ops.aten._unsafe_view.default)


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that run in the block, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(work: Callable[[], object]) -> list[Call]:
    record = Recorded()
    with record:
        work()
    return record.calls


def needs_the_host(call: Call) -> bool:
    """Whether a GPU's numbers decide what the host does next; a CUDA graph cannot hold that."""
    operator, args = call
    if torch.Tag.data_dependent_output in operator.tags:
        return True
    indices = args[1] if operator is torch.ops.aten.index_put_.default else ()
    if operator is torch.ops.aten.index.Tensor:
        indices = args[1]
    elif torch.Tag.dynamic_output_shape in operator.tags:
        return True
    return any(index is not None and index.dtype == torch.bool for index in indices)


def test_a_step_fits_into_graphs_and_is_copied_to_the_host_once() -> None:
    tokenizer = small_tokenizer()
    slots = 5
    engine = Engine(random_gpt(tokenizer), tokenizer, backend="graph", max_batch_size=slots)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {},
    ]  # fmt: skip
    for one in settings:
        sampling = Sampling(max_new_tokens=30, min_new_tokens=30, **one)
        engine.submit(texts.Sequence([3, 4, 5], sampling))
    engine.step()
    calls = recorded(engine.step)
    assert any(operator is torch.ops.aten.searchsorted.Tensor for operator, _ in calls)
    assert not [operator for operator, args in calls if needs_the_host((operator, args))]
    # Such copies go to the device, but for the tokens, which are the only ones with one dimension.
    copies = [
        args[0] for operator, args in calls
        if operator is torch.ops.aten.copy_.default and args[2:] == (True,)
    ]  # fmt: skip
    assert [copy.shape for copy in copies if copy.dim() == 1] == [(slots,)]


def test_a_step_reads_more_prompts_than_a_pass_has_rows() -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, n_positions=1300)
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    asked = [texts.Sequence(prompt_of(tokenizer, n, n), greedy) for n in (1, 1250, 3, 900, 600)]
    asked.append(texts.Sequence(prompt_of(tokenizer, 400, 0), greedy, prompt_logprobs=1))
    expected = run(Engine(model, tokenizer), asked)
    engine = Engine(model, tokenizer, backend="graph", max_batch_size=8)
    given = [engine.submit(replace(sequence)) for sequence in asked]
    for step in range(3):
        engine.step()
        # The second piece of the long prompt, and what is in line after it, come a step later.
        assert [len(sequence.drawn) for sequence in given] == [step + 1, *[step] * 5]
    engine.run([])
    for one, other in zip(given, expected, strict=True):
        assert one.tokens == other.tokens
        for found, score in zip(one.scored[1:], other.scored[1:], strict=True):
            assert found.token == score.token
            assert found.logprob == pytest.approx(score.logprob, abs=1e-4)


def test_a_cache_with_no_memory_to_grow_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer()
    model = random_gpt(tokenizer, n_positions=1300)
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    asked = [texts.Sequence(prompt_of(tokenizer, n, n), greedy) for n in (3, 1200)]
    expected = [one.tokens for one in run(Engine(model, tokenizer), asked)]
    engine, zeros = Engine(model, tokenizer, backend="graph", max_batch_size=2), torch.zeros
    grown, made = list[int](), list[weakref.ref[torch.Tensor]]()

    def few(like: torch.Tensor, *sizes: Any) -> torch.Tensor:
        shape = sizes[0] if isinstance(sizes[0], tuple) else sizes
        if len(shape) == 5:
            grown.append(shape[3])
            if len(grown) == model.config.n_layer:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        result = zeros(shape, dtype=like.dtype)
        if len(shape) == 5:
            made.append(weakref.ref(result))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_zeros", few)
        long = engine.submit(replace(asked[1]))
        with pytest.raises(torch.OutOfMemoryError):
            engine.run([])
        assert [one() for one in made] == [None]  # the layer that had grown gave it back
        engine.cancel(long)
        assert [one.tokens for one in run(engine, asked[:1])] == expected[:1]
    assert grown == [1300, 1300]
    assert [one.tokens for one in run(engine, asked)] == expected


def test_a_step_with_adapters_waits_for_no_layer(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    base = save_base(random_gpt(tokenizer, n_layer=3), tmp_path / "base", tokenizer)
    everywhere = write_adapter(base, tmp_path / "one")
    queries = write_adapter(base, tmp_path / "two", seed=1, targets=["c_attn"])
    decoder = network("torch", load_pretrained(base.folder), 4, torch.float32)
    adapters = [
        decoder.pack(load_low_rank(base, open_adapter(folder, base)))
        for folder in (everywhere, queries)
    ]
    asked = [(3, 0), (4, 0), (5, 0), (6, 0)]
    calls = recorded(
        lambda: decoder.step(StepRows(asked, [], adapters=[*adapters, None, adapters[0]]))
    )
    assert len(calls) > 100
    assert not [operator for operator, args in calls if needs_the_host((operator, args))]


def test_a_micro_step_of_gpt2_asks_for_few_kernels() -> None:
    with torch.device("meta"):
        shape = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, dropout=0.0)
        model = GPT(shape, vocab_size=50304)
        model.compute_dtype = torch.bfloat16
        idx = torch.zeros(32, 1024, dtype=torch.int64)
        calls = recorded(lambda: model(idx, idx).backward())
    kernels = [
        operator
        for operator, _ in calls
        if not (operator.is_view or operator in NO_KERNELS or torch.Tag.pointwise in operator.tags)
    ]
    assert 200 < len(kernels) <= 500
