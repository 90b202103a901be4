"""Parts of a file of prompts through one engine: a Parquet file for each, whole or not there.

The engine stays full from one part to the next: `feed` returns as soon as it could take more
requests, and the rows that are still running end while the next part runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from gptray.config import RunFailed, SampleConfig, UserError
from gptray.data.parts import part_name, write_whole
from gptray.data.tokenizer import Tokenizer
from gptray.generation.engine import Engine
from gptray.generation.request import Generation, Request
from gptray.generation.settings import Sampling


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("not a whole number")
    return int(value)


# Columns of the input that set a row's own sampling, with what reads them.
ROW_SETTINGS: dict[str, Any] = {
    "max_new_tokens": _whole,
    "min_new_tokens": _whole,
    "temperature": float,
    "top_k": _whole,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": _whole,
    "stop": lambda value: value if isinstance(value, str) else tuple(value),
}
# How a column of that name in the input is called in a staged part; `seed` is the output's own.
STAGED_SETTINGS = {name: "input_seed" if name == "seed" else name for name in ROW_SETTINGS}


@dataclass
class Progress:
    """What an engine has done since it started; seconds of its steps, and from its first to now."""

    rows: int = 0
    errors: int = 0
    output_tokens: int = 0
    step_seconds: float = 0.0
    first: float | None = None
    last: float = 0.0


@dataclass
class _Row:
    """A row of a part: its request on the way, or what is wrong with it."""

    seed: int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    generation: Generation | None = None


@dataclass
class _Part:
    number: int
    table: pa.Table
    rows: list[_Row] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(r.generation is None or r.generation.finish_reason for r in self.rows)


class PartWriter:
    """Runs staged parts and writes their outputs into `output_dir`.

    metadata goes into every file. model is the name in the column of that name.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        defaults: SampleConfig,
        output_dir: Path,
        *,
        model: str,
        metadata: Mapping[str, str],
    ) -> None:
        self.progress = Progress()
        self._engine, self._tokenizer, self._defaults = engine, tokenizer, defaults
        self._output_dir, self._model, self._metadata = output_dir, model, dict(metadata)
        self._parts: list[_Part] = []

    def feed(self, number: int, staged: Path) -> list[int]:
        """Take on a part; run until more could be taken. Returns the parts written meanwhile."""
        part = _Part(number, parquet.read_table(staged))
        part.rows = [self._start(row) for row in part.table.to_pylist()]
        self._parts.append(part)
        return self._run(until_empty=False)

    def finish(self) -> list[int]:
        """Run to the end of all parts. Returns those written meanwhile."""
        return self._run(until_empty=True)

    def _start(self, row: dict[str, Any]) -> _Row:
        if row["error"] is not None:
            return _Row(error=row["error"])
        started = _Row()
        try:
            sampling = self._sampling(row)
            started.seed = sampling.seed
            prompt = self._tokenizer.encode(row["prompt"])
            started.prompt_tokens = len(prompt)
            started.generation = self._engine.submit(Request(prompt, sampling))
        except (UserError, ValueError) as error:
            started.error = str(error)
        return started

    def _sampling(self, row: dict[str, Any]) -> Sampling:
        own = {}
        for name, read in ROW_SETTINGS.items():
            value = row.get(STAGED_SETTINGS[name])
            if value is not None and value != "":
                try:
                    own[name] = read(value)
                except (TypeError, ValueError):
                    raise ValueError(f"{name}={value!r} is not what {name} can be") from None
        return Sampling.of(self._defaults, **own)

    def _run(self, *, until_empty: bool) -> list[int]:
        written = self._write_done()
        progress, engine = self.progress, self._engine
        while engine.busy and (until_empty or engine.waiting):
            begin = time.monotonic()
            progress.first = begin if progress.first is None else progress.first
            try:
                stepped = engine.step()
            except ValueError as error:
                raise RunFailed(str(error)) from None
            progress.last = time.monotonic()
            progress.step_seconds += progress.last - begin
            ended = [g for g in stepped if g.finish_reason is not None]
            progress.output_tokens += sum(len(generation.tokens) for generation in ended)
            progress.rows += len(ended)
            if ended:
                written += self._write_done()
        return written

    def _write_done(self) -> list[int]:
        done = [part for part in self._parts if part.done]
        for part in done:
            failed = sum(row.error is not None for row in part.rows)
            self.progress.rows += failed
            self.progress.errors += failed
            write_whole(self._output(part), self._output_dir / part_name(part.number))
            self._parts.remove(part)
        return [part.number for part in done]

    def _output(self, part: _Part) -> pa.Table:
        staged = part.table
        generations = [row.generation for row in part.rows]
        columns = {
            "id": staged["id"],
            "prompt": staged["prompt"],
            "output": pa.array([g and g.text for g in generations], pa.string()),
            "finish_reason": pa.array(
                [g.finish_reason if g else "error" for g in generations], pa.string()
            ),
            "prompt_tokens": pa.array([row.prompt_tokens for row in part.rows], pa.int32()),
            "output_tokens": pa.array([len(g.tokens) if g else 0 for g in generations], pa.int32()),
            "seed": pa.array([row.seed for row in part.rows], pa.int64()),
            "error": pa.array([row.error for row in part.rows], pa.string()),
            "model": pa.array([self._model] * len(part.rows), pa.string()),
        }
        columns |= {name: staged[name] for name in staged.column_names if name not in columns}
        return pa.table(columns).replace_schema_metadata(self._metadata)
