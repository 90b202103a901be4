"""An actor of an evaluate job: it holds the model and answers calls as they come.

A call's result depends neither on the actor nor on the number of actors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from gptray.config import Config, RunFailed
from gptray.data.scoring import Windows
from gptray.data.tokens import TokenData
from gptray.evaluation.metrics import (
    DocumentSums,
    Measure,
    Scored,
    compared,
    document_ends,
    losses,
    scoring_dtype,
    sum_windows,
)
from gptray.evaluation.recitation import found_in
from gptray.generation import sequence
from gptray.generation.engine import Engine
from gptray.generation.settings import Sampling
from gptray.generation.window_reader import WindowReader
from gptray.jobs.cluster.tasks import Failure, attempt
from gptray.jobs.folders.remote_data import tokens_on_node
from gptray.model.adapter_files import load_adapted
from gptray.model.gpt import GPT
from gptray.model.gpu_faults import check_gpu, memory_told
from gptray.model.memory import keep_freed_memory
from gptray.model.precision import enable_fast_fp32
from gptray.native.core_sharing import share_cores


@dataclass(frozen=True)
class EvaluationTask:
    """The models and tokens that an actor works on, and its number of threads.

    models: folders that every node sees, or URIs. also: tokens of evaluate.also's texts, by name.
    """

    config: Config
    models: list[str]
    data_dir: Path
    also: Mapping[str, Path]
    block_size: int
    threads: int


@dataclass(frozen=True)
class Call:
    """A call of one of `Scorer`'s methods, and its number of tokens."""

    method: str
    arguments: tuple[Any, ...]
    tokens: int


@dataclass(frozen=True)
class Continuation:
    """The model's continuation of a prompt."""

    tokens: list[int]
    text: str


class Scorer:
    """A Ray actor. Its first call loads the models, so that errors in them are the call's."""

    def __init__(self, task: EvaluationTask) -> None:
        self._task, self._config = task, task.config
        self._ends: dict[str, NDArray[Any]] = {}

    def answer(self, call: Call) -> Any | Failure:
        """Call one of the methods below."""
        return attempt(lambda: getattr(self, call.method)(*call.arguments))

    def process(self) -> int:
        return os.getpid()

    def precision(self) -> str:
        """The precision in which the network computes: fp32 or bf16."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._models[0].compute_dtype]

    def score(self, name: str, windows: Windows, numbers: Sequence[int]) -> DocumentSums:
        """Score windows of a split, by the average of the models' probabilities."""
        (sums,) = self._sums(lambda *read: losses(self._scored, *read), name, windows, numbers)
        return sums

    def compare(self, name: str, windows: Windows, numbers: Sequence[int]) -> list[DocumentSums]:
        """Read windows of a split with the full weights and with those of evaluate.quantized."""
        return self._sums(partial(compared, self._readers), name, windows, numbers)

    def _sums(
        self, measure: Measure, name: str, windows: Windows, numbers: Sequence[int]
    ) -> list[DocumentSums]:
        split = self._data.scored[name]
        if name not in self._ends:
            self._ends[name] = document_ends(split, self._data.eos_id)
        with self._memory_told():
            return sum_windows(
                measure,
                split,
                windows,
                numbers,
                ends=self._ends[name],
                batch_size=self._config.evaluate.micro_batch_size,
                device=self._models[0].device,
            )

    def write(
        self, prompts: list[list[int]], lengths: list[int], sampling: Sampling, first: int
    ) -> list[Continuation]:
        """Continue each prompt by its length or until its end; rows of the seed count from `first`.

        When the window is full, its last half becomes the prompt.
        """
        written: list[list[int]] = [[] for _ in prompts]
        left = dict(enumerate(lengths))
        while left:
            requests = {n: self._request(prompts[n] + written[n], left[n], sampling, first + n)
                        for n in left}  # fmt: skip
            with self._memory_told():
                done = self._engine.run(list(requests.values()))
            for n, generation in zip(requests, done, strict=True):
                if generation.error:
                    raise RunFailed(f"the model cannot continue a passage: {generation.error}")
                written[n] += generation.tokens
                left[n] -= len(generation.tokens)
                if generation.finish_reason == "stop" or left[n] <= 0:
                    del left[n]
        return [Continuation(tokens, self._data.tokenizer.decode(tokens)) for tokens in written]

    def find(self, start: int, stop: int, wanted: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Search a range of the training split for n-grams."""
        return list(found_in(self._data.train, start, stop, wanted))

    def _memory_told(self) -> AbstractContextManager[None]:
        return memory_told("evaluate.micro_batch_size", self._config.evaluate.micro_batch_size)

    def _request(
        self, tokens: list[int], wanted: int, sampling: Sampling, row: int
    ) -> sequence.Sequence:
        block_size, tokenizer = self._task.block_size, self._data.tokenizer
        tokens = [*tokenizer.prefix, *tokens]
        if len(tokens) >= block_size:
            tokens = tokenizer.last_ids(tokens, block_size // 2)
        room = min(wanted, block_size - len(tokens))
        return sequence.Sequence(tokens, replace(sampling, max_new_tokens=room), sample=row)

    @cached_property
    def _data(self) -> TokenData:
        here = partial(tokens_on_node, self._config)
        also = {name: here(folder) for name, folder in self._task.also.items()}
        return TokenData.open(here(self._task.data_dir), also=also)

    @cached_property
    def _models(self) -> list[GPT]:
        torch.set_num_threads(self._task.threads)
        enable_fast_fp32()
        keep_freed_memory()
        device = torch.device("cuda" if self._config.compute.use_gpu else "cpu")
        if device.type == "cuda":
            check_gpu()
        else:
            share_cores()
        dtype = scoring_dtype(self._config.evaluate.precision, device)
        adapter = self._config.evaluate.adapter
        models = [load_adapted(source, adapter).eval() for source in self._task.models]
        for model in models:
            model.compute_dtype = dtype
        return [model.to(device) for model in models]

    @cached_property
    def _scored(self) -> Sequence[Scored]:
        """The models to score; with quantized weights, by the engine's network."""
        kind = self._config.quantize.weights
        return self._models if kind == "none" else [self._reader(m, kind) for m in self._models]

    @cached_property
    def _readers(self) -> list[WindowReader]:
        """Readers of the model with its full weights and with each kind in evaluate.quantized."""
        kinds = ("none", *self._config.evaluate.quantized)
        return [self._reader(self._models[0], kind) for kind in kinds]

    def _reader(self, model: GPT, kind: str) -> WindowReader:
        return WindowReader(model, dtype=model.compute_dtype, quantize=kind, backend=self._backend)

    @property
    def _backend(self) -> str:
        """The engine's backend; fixed rather than timed, so that all nodes use the same one."""
        if self._config.compute.use_gpu:
            return "graph"
        return "native" if self._config.generate.backend == "native" else "torch"

    @cached_property
    def _engine(self) -> Engine:
        batch_size = self._config.evaluate.micro_batch_size
        model = self._models[0]
        return Engine(
            model,
            self._data.tokenizer,
            max_batch_size=batch_size,
            dtype=model.compute_dtype,
            quantize=self._config.quantize.weights,
            backend=self._backend,
        )
