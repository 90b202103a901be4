"""The workers of an evaluate job: Ray actors, each with the model, that take tasks as they come.

What a task gives does not depend on the actor that does it, nor on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptray.config import Config, RunFailed, UserError
from gptray.data.scoring import Windows
from gptray.data.tokens import TokenData
from gptray.jobs.bar import Bar
from gptray.jobs.cluster import worker_resources
from gptray.jobs.evaluate.check import Subject
from gptray.jobs.train.watch import duration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptray.evaluation.metrics import DocumentSums
    from gptray.generation import sequence
    from gptray.generation.engine import Engine
    from gptray.generation.settings import Sampling
    from gptray.model.gpt import GPT


@dataclass(frozen=True)
class Task:
    """A call of one of `Scorer`'s methods, and how many tokens it is about."""

    method: str
    arguments: tuple[Any, ...]
    tokens: int


@dataclass(frozen=True)
class Continuation:
    """What the model has written."""

    tokens: list[int]
    text: str


class Scorer:
    """A Ray actor. The model is loaded by the first task, so that its faults are a task's error."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._config = Config.model_validate(settings["config"])
        self._ends: dict[str, NDArray[Any]] = {}

    def precision(self) -> str:
        """What the network computes in: fp32 or bf16."""
        import torch

        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._model.compute_dtype]

    def score(self, name: str, windows: Windows, numbers: Sequence[int]) -> DocumentSums:
        """Score windows of a split."""
        from gptray.evaluation.metrics import document_ends, score_windows

        split, size = self._data.splits[name], self._config.evaluate.micro_batch_size
        if name not in self._ends:
            self._ends[name] = document_ends(split, self._data.eos_id)
        ends = self._ends[name]
        with self._memory_told():
            return score_windows(self._model, split, windows, numbers, ends=ends, batch_size=size)

    def write(
        self, prompts: list[list[int]], lengths: list[int], sampling: Sampling, first: int
    ) -> list[Continuation]:
        """Continue each prompt by so many tokens, or until it ends; their rows count from `first`.

        Where the window is full, the last half of it is the prompt of what follows.
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
        """Look for n-grams in a range of the training split."""
        from gptray.evaluation.recitation import found_in

        return list(found_in(self._data.train, start, stop, wanted))

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Say which key to lower where a GPU's memory is too small. Raises RunFailed."""
        import torch

        from gptray.model.gpu import out_of_gpu_memory

        try:
            yield
        except torch.OutOfMemoryError as error:
            size = self._config.evaluate.micro_batch_size
            raise out_of_gpu_memory(error, key="evaluate.micro_batch_size", size=size) from None

    def _request(
        self, tokens: list[int], wanted: int, sampling: Sampling, row: int
    ) -> sequence.Sequence:
        from gptray.generation import sequence

        block_size: int = self._settings["block_size"]
        if len(tokens) >= block_size:
            tokens = tokens[-(block_size // 2) :]
        room = min(wanted, block_size - len(tokens))
        return sequence.Sequence(tokens, replace(sampling, max_new_tokens=room), row=row)

    @cached_property
    def _data(self) -> TokenData:
        return TokenData.open(self._settings["data_dir"])

    @cached_property
    def _model(self) -> GPT:
        import torch

        from gptray.evaluation.metrics import scoring_dtype
        from gptray.model.gpu import check_gpu
        from gptray.model.hf import load_pretrained
        from gptray.model.memory import keep_freed_memory
        from gptray.model.precision import enable_fast_fp32

        torch.set_num_threads(self._settings["threads"])
        enable_fast_fp32()
        keep_freed_memory()
        device = torch.device("cuda" if self._config.compute.use_gpu else "cpu")
        if device.type == "cuda":
            check_gpu()
        model = load_pretrained(self._settings["model_dir"]).eval()
        model.compute_dtype = scoring_dtype(self._config.evaluate.precision, device)
        return model.to(device)

    @cached_property
    def _engine(self) -> Engine:
        from gptray.generation.engine import Engine

        batch_size = self._config.evaluate.micro_batch_size
        model = self._model
        return Engine(
            model,
            self._data.tokenizer,
            max_batch_size=batch_size,
            dtype=model.compute_dtype,
            backend="graph" if self._config.compute.use_gpu else "torch",
        )


class Scorers:
    """The actors of a job, started by the first of its tasks."""

    def __init__(self, subject: Subject, data: TokenData) -> None:
        import ray
        from ray.util import ActorPool

        compute = subject.config.compute
        reserved = worker_resources(compute)
        settings = {
            "config": subject.config.model_dump(mode="json"),
            "model_dir": str(subject.model_dir),
            "data_dir": str(data.data_dir),
            "block_size": subject.block_size,
            "threads": max(1, int(reserved["CPU"])),
        }
        actor = ray.remote(Scorer).options(
            num_cpus=reserved["CPU"],
            num_gpus=reserved.get("GPU", 0),
            max_restarts=compute.max_failures,
            max_task_retries=compute.max_failures,
        )
        self._most_failures = compute.max_failures
        self._actors = [actor.remote(settings) for _ in range(compute.num_workers)]
        self._pool = ActorPool(self._actors)

    @property
    def precision(self) -> str:
        """What the networks of all actors compute in: fp32 or bf16."""
        import ray

        precision: str = ray.get(self._actors[0].precision.remote())
        return precision

    def run(self, doing: str, tasks: Sequence[Task]) -> list[Any]:
        """Have all tasks done; their results in the tasks' order.

        Raises the UserError of a task, or RunFailed when workers keep dying.
        """
        import ray

        def start(actor: Any, task: Task) -> Any:
            return getattr(actor, task.method).remote(*task.arguments)

        try:
            with closing(_Progress(doing, sum(task.tokens for task in tasks))) as progress:
                results = []
                for task, result in zip(tasks, self._pool.map(start, tasks), strict=True):
                    results.append(result)
                    progress.add(task.tokens)
                return results
        except ray.exceptions.RayActorError as error:
            # Its other lines are numbers by which Ray knows the actor.
            why = str(error).strip().splitlines()[-1]
            raise RunFailed(
                f"a worker died more than compute.max_failures={self._most_failures} times. {why}"
            ) from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, (UserError, RunFailed)) else error) from None


class _Progress:
    """Tokens done, tokens per second, time to go."""

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._began = time.monotonic()
        self._bar = Bar(doing, total)

    def add(self, tokens: int) -> None:
        self._done += tokens
        pace = self._done / max(time.monotonic() - self._began, 1e-9)
        speed, left = f"{pace:,.0f} tok/s", duration((self._total - self._done) / pace)
        is_end = self._done >= self._total
        line = f"{self._doing} {self._done:,}/{self._total:,} tokens  {speed}  eta {left}"
        self._bar.show(self._doing, self._done, speed, eta=left, line=None if is_end else line)

    def close(self) -> None:
        self._bar.close()
