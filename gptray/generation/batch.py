"""Runs a prompt file part by part through one engine; each part becomes a Parquet file, atomically.

The engine stays full from one part to the next: `feed` returns as soon as there is room for more
requests, and rows that are still running finish while the next part runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gptray.config import SampleConfig, UserError
from gptray.config.limits import SEEDS
from gptray.data.parts import part_name, read_whole, write_part
from gptray.data.prompts import (
    ADAPTER,
    CHAT,
    ERROR,
    ID,
    IDS,
    PROMPT,
    SETTINGS,
    STAGED,
    output_schema,
)
from gptray.data.tokenizer import Tokenizer
from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling, derived_seed, numbered_seed
from gptray.model.adapter import adapted_name


@dataclass
class Progress:
    """What an engine has done since it started.

    step_seconds: spent in steps. first, last: when its first step began and its last one ended,
    on the monotonic clock. running, waiting: sequences in the batch and in the queue after the
    last step.
    """

    rows: int = 0
    errors: int = 0
    output_tokens: int = 0
    step_seconds: float = 0.0
    first: float | None = None
    last: float = 0.0
    running: int = 0
    waiting: int = 0


@dataclass
class _Row:
    """A row of the output: its sequence, or why it has none."""

    seed: int
    adapter: str | None
    error: str | None
    prompt_tokens: int
    sequence: Sequence | None = None

    @property
    def problem(self) -> str | None:
        return self.sequence.error if self.sequence else self.error

    @property
    def done(self) -> Sequence | None:
        """The sequence if nothing went wrong with it; complete once the part is done."""
        return None if self.problem is not None else self.sequence


@dataclass
class _Part:
    number: int
    staged: pa.Table
    rows: list[_Row]

    @property
    def done(self) -> bool:
        return all(row.sequence is None or row.sequence.ended for row in self.rows)


class PartWriter:
    """Runs staged parts (`gptray.data.prompts`) and writes their outputs into `output_dir`.

    num_samples: outputs per row of a part. model: what the column `model` says. metadata: goes into
    every file. adapters: by the names that rows use for them.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        defaults: SampleConfig,
        output_dir: Path,
        *,
        num_samples: int,
        model: str,
        metadata: Mapping[str, str],
        adapters: Mapping[str, PackedAdapter] | None = None,
    ) -> None:
        self.progress = Progress()
        self._engine, self._tokenizer, self._defaults = engine, tokenizer, defaults
        self._output_dir, self._num_samples = output_dir, num_samples
        self._model, self._metadata = model, dict(metadata)
        self._adapters = adapters or {}
        self._parts: list[_Part] = []

    def feed(self, number: int, staged: Path) -> list[int]:
        """Queue a part, and step until the queue is empty. Returns the parts written meanwhile."""
        table = read_whole(staged)
        columns = [table.column(place).to_pylist() for place in (SETTINGS, ERROR, ID, PROMPT)]
        rows = [row for values in zip(*columns, strict=True) for row in self._start(*values)]
        self._parts.append(_Part(number, table, rows))
        return self._run(until_empty=False)

    def finish(self) -> list[int]:
        """Run all parts to their end. Returns those written meanwhile."""
        return self._run(until_empty=True)

    def _start(
        self, settings: str | None, error: str | None, name: int | str, prompt: str
    ) -> list[_Row]:
        """Submit a row of the input; returns its rows of the output."""
        own: dict[str, Any] = json.loads(settings) if settings else {}
        first: int = own.pop("seed", derived_seed(self._defaults.seed, name))
        adapter: str | None = own.pop(ADAPTER, None)
        chat: str | None = own.pop(CHAT, None)
        ids: list[int] | None = own.pop(IDS, None)
        if adapter is not None and adapter not in self._adapters:
            known = ", ".join(self._adapters)
            error = error or f"the adapter {adapter!r} is not in generate.adapters ({known})"
        tokens = ids or []
        if error is None and ids is None:
            try:
                special = self._defaults.parse_special
                tokens = (
                    self._tokenizer.prompt_ids(prompt, parse_special=special)
                    if chat is None
                    else self._tokenizer.chat_ids(chat)
                )
            except UserError as problem:
                error = str(problem)
        seeds = [numbered_seed(first, sample) for sample in range(self._num_samples)]
        rows = [_Row(seed, adapter, error, len(tokens)) for seed in seeds]
        for row in rows if error is None else ():
            try:
                sampling = Sampling.of(self._defaults, seed=row.seed, **own)
                row.sequence = self._engine.submit(
                    Sequence(tokens, sampling, adapter=self._adapters.get(adapter or ""))
                )
            except ValueError as problem:
                row.error = str(problem)
        return rows

    def _run(self, *, until_empty: bool) -> list[int]:
        written = self._write_done()
        progress, engine = self.progress, self._engine
        while engine.busy and (until_empty or engine.waiting):
            begin = time.monotonic()
            progress.first = begin if progress.first is None else progress.first
            stepped = engine.step()
            progress.last = time.monotonic()
            progress.step_seconds += progress.last - begin
            progress.running, progress.waiting = engine.running, engine.waiting
            ended = [sequence for sequence in stepped if sequence.ended]
            progress.output_tokens += sum(len(sequence.drawn) for sequence in ended)
            progress.rows += len(ended)
            if ended:
                written += self._write_done()
        return written

    def _write_done(self) -> list[int]:
        done = [part for part in self._parts if part.done]
        for part in done:
            # Rows that ran were counted when they ended.
            self.progress.rows += sum(row.sequence is None for row in part.rows)
            self.progress.errors += sum(row.problem is not None for row in part.rows)
            write_part(self._output(part), self._output_dir / part_name(part.number))
            self._parts.remove(part)
        return [part.number for part in done]

    def _output(self, part: _Part) -> pa.Table:
        staged, rows, samples = part.staged, part.rows, self._num_samples
        if samples > 1:
            # Table.take cannot copy views.
            copies = [staged.slice(row, 1) for row in range(len(staged)) for _ in range(samples)]
            staged = pa.concat_tables(copies)
        done = [row.done for row in rows]
        own = {
            "sample": [number % samples for number in range(len(rows))],
            "output": [one and one.text for one in done],
            "finish_reason": [one.finish_reason if one else "error" for one in done],
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "output_tokens": [len(one.drawn) if one else 0 for one in done],
            # A seed that 64 bits cannot hold is named in the row's error.
            "seed": [row.seed if -SEEDS <= row.seed < SEEDS else None for row in rows],
            "error": [row.problem for row in rows],
            "model": [
                adapted_name(self._model, row.adapter) if row.adapter else self._model
                for row in rows
            ],
        }
        given = {"id": staged.column(ID), "prompt": staged.column(PROMPT)}
        passed = [staged.column(place) for place in range(len(STAGED), staged.num_columns)]
        schema = output_schema(staged.schema, samples, self._metadata)
        arrays = [
            given[field.name] if field.name in given else pa.array(own[field.name], field.type)
            for field in list(schema)[: len(schema) - len(passed)]
        ]
        return pa.Table.from_arrays([*arrays, *passed], schema=schema)
