"""The input of a batch job: one pass over all rows, then parts of it ready for an engine.

A problem with the input as a whole (a file that cannot be read, a column that cannot pass through,
a duplicate id) is an error before anything starts. A problem with a single row becomes that row's
`error` in the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa

from gptray.config import GenerateConfig, UserError
from gptray.data.batch_requests import ID_KEY, RowRequest, check_urls, holds_requests
from gptray.data.batches import Batch, Values, read_batches
from gptray.data.columns import FoundColumns, InputColumns
from gptray.data.json_columns import is_utf8
from gptray.data.own_columns import near_misses
from gptray.data.row_ids import Ids
from gptray.data.row_settings import read_settings
from gptray.data.rows import kind_of
from gptray.data.sources import SourceFile

ReadRequest = Callable[[Values], RowRequest]

# The first columns of a staged part, before those that pass through: the row's own settings (JSON),
# the reason why it cannot run, its id, its prompt.
SETTINGS, ERROR, ID, PROMPT = range(4)
# Keys in a row's settings: the name of its adapter, a chat as its template renders it, and a
# prompt's token ids.
ADAPTER, CHAT, IDS = "adapter", "chat", "ids"
STAGED = ("gptray.settings", "gptray.error", "id", "prompt")

_OWN = {
    "output": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "output_tokens": pa.int32(),
    "seed": pa.int64(),
    "error": pa.string(),
    "model": pa.string(),
}


@dataclass(frozen=True)
class InputScan:
    """The result of one pass over all rows."""

    rows: int
    columns: InputColumns

    @property
    def schema(self) -> pa.Schema:
        """The schema of a staged part."""
        columns = self.columns
        own = [
            pa.field(STAGED[SETTINGS], pa.string()),
            pa.field(STAGED[ERROR], pa.string()),
            columns.id_field,
            columns.prompt_field,
        ]
        passed = [field.with_name(name) for field, name in columns.passed]
        return pa.schema([*own, *passed], metadata=columns.metadata)


def check_input(files: Sequence[SourceFile], settings: GenerateConfig) -> None:
    """Check the columns that files declare, and first rows: fast, however large the files.

    Raises UserError for the mistakes of `scan` that these reveal.
    """
    _, columns = _declared(files, settings)
    columns.check_names()


def scan(files: Sequence[SourceFile], settings: GenerateConfig) -> InputScan:
    """Examine every row once.

    Raises UserError for a file that cannot be read, a column that cannot pass through, or an id
    that is missing or duplicate.
    """
    settings, columns = _declared(files, settings)
    requests = columns.prompt_column is None
    rows, ids, urls = 0, Ids(settings.id_column or "id"), set[str]()
    for batch in _batches(files, settings.prompt_column):
        rows += batch.rows
        ids.take(batch)
        columns.take(batch)
        if requests:
            urls.update(map(str, batch.values("url")))
    if requests:
        check_urls(files, urls)
    if columns.id_column is not None:
        ids.check(lambda: _batches(files, settings.prompt_column))
    found = columns.resolve()
    if not requests:
        found.notes.extend(near_misses(columns.names, settings))
    return InputScan(rows, found)


def _declared(
    files: Sequence[SourceFile], settings: GenerateConfig
) -> tuple[GenerateConfig, FoundColumns]:
    """The columns that the files declare, and the settings adapted to this kind of file."""
    requests = holds_requests(files, settings)
    if requests and settings.adapter_column is not None:
        raise UserError(
            "generate.adapter_column cannot be used with OpenAI batch files, which have no columns"
        )
    if requests and settings.id_column is None:
        settings = settings.model_copy(update={"id_column": ID_KEY})
    columns = FoundColumns(settings, None if requests else settings.prompt_column)
    for file in files:
        columns.declare(file)
    return settings, columns


def _batches(files: Sequence[SourceFile], prompt_column: str) -> Iterator[Batch]:
    return chain.from_iterable(read_batches(file, prompt_column) for file in files)


def staged(
    files: Sequence[SourceFile], found: InputScan, rows_per_part: int, read_request: ReadRequest
) -> Iterator[pa.Table]:
    """Yield the rows in parts, at least one: the columns STAGED, then those that pass through.

    Raises UserError for a column that a part cannot hold.
    """
    schema = found.schema
    part: list[pa.RecordBatch] = []
    room, position, empty = rows_per_part, 0, True
    for batch in _batches(files, found.columns.prompt_column or ""):
        rows = _staged_batch(batch, found, position, schema, read_request)
        position += rows.num_rows
        while rows.num_rows:
            part.append(rows.slice(0, room))
            room -= part[-1].num_rows
            rows = rows.slice(part[-1].num_rows)
            if not room:
                yield _part(part, schema)
                part, room, empty = [], rows_per_part, False
    if part or empty:
        yield _part(part, schema)


def _part(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    table = pa.Table.from_batches(batches, schema)
    for place, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            try:
                table = table.set_column(place, field, _one_dictionary(table.column(place)))
            except pa.ArrowInvalid:
                raise UserError(
                    f"generate.input_path: column {field.name!r} has more values in "
                    f"{len(table):,} rows than its type, {field.type}, can index; convert it to "
                    "text, or lower generate.rows_per_file"
                ) from None
    return table


def _one_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.DictionaryArray:
    """Give all chunks of a column one dictionary.

    It holds all values or, if these are too many, those in use; an ordered one always holds all.
    Raises pa.ArrowInvalid if the column's index type cannot number them.
    """
    kind = column.type
    try:
        return column.unify_dictionaries()
    except pa.ArrowInvalid:
        if kind.ordered:
            raise
    used = column.cast(kind.value_type).combine_chunks().dictionary_encode()
    return pa.DictionaryArray.from_arrays(used.indices.cast(kind.index_type), used.dictionary)


def output_schema(
    staged: pa.Schema, num_samples: int, metadata: Mapping[str, str] | None = None
) -> pa.Schema:
    """The output's columns; `metadata` is added to the input's own."""
    fields = list(staged)
    sample = [pa.field("sample", pa.int32())] if num_samples > 1 else []
    own = [pa.field(name, kind) for name, kind in _OWN.items()]
    return pa.schema(
        [fields[ID], *sample, fields[PROMPT], *own, *fields[len(STAGED) :]],
        metadata={**(staged.metadata or {}), **(metadata or {})},
    )


def prompt_problem(value: object) -> str | None:
    """Why a prompt cannot run; None if it can."""
    if value is None:
        return "the prompt is null"
    if isinstance(value, str):
        return None if is_utf8(value) else "the prompt holds half a surrogate pair"
    return (
        None if _are_ids(value) else f"the prompt must be text or token ids, got {kind_of(value)}"
    )


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(one) is int for one in prompt)


def _staged_batch(
    batch: Batch, found: InputScan, position: int, schema: pa.Schema, read_request: ReadRequest
) -> pa.RecordBatch:
    columns = found.columns
    if columns.prompt_column is None:
        objects = {name: batch.values(name) for name in ("method", "url", "body")}
        requests = [
            read_request(dict(zip(objects, row, strict=True)))
            for row in zip(*objects.values(), strict=True)
        ]
    else:
        given = {name: batch.values(name) for name in columns.settings}
        requests = [
            RowRequest(prompt, *read_settings({name: given[name][row] for name in given}))
            for row, prompt in enumerate(batch.values(columns.prompt_column))
        ]
        if columns.adapter_column is not None:
            adapters = batch.values(columns.adapter_column)
            for request, adapter in zip(requests, adapters, strict=True):
                if adapter not in (None, ""):  # the engine checks that it exists
                    request.settings[ADAPTER] = str(adapter)
    for request in requests:
        if _are_ids(request.prompt):
            request.settings[IDS] = request.prompt
    errors = [request.error or prompt_problem(request.prompt) for request in requests]
    own = [
        pa.array([json.dumps(r.settings) if r.settings else None for r in requests], pa.string()),
        pa.array(errors, pa.string()),
        columns.ids(batch, position),
        columns.prompts(batch, [request.prompt for request in requests]),
    ]
    passed = [batch.array(field) for field, _ in columns.passed]
    return pa.RecordBatch.from_arrays([*own, *passed], schema=schema)
