"""The columns of a batch job's input: one schema for all files, and each column in the output.

Parquet declares its columns, CSV and text files hold text, and every JSON row is examined. A
column must have the same type in all files, or the input is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from gptray.config import GenerateConfig, UserError
from gptray.data.batches import ArrowBatch, Batch, ObjectBatch, declared_schema, first_row, is_json
from gptray.data.csv_text import separator_hint
from gptray.data.json_columns import Shape, holds_json, is_utf8, json_field, json_text
from gptray.data.own_columns import passed_names, setting_columns
from gptray.data.parts import unwritable
from gptray.data.row_ids import check_id_type
from gptray.data.row_settings import check_seed_type, check_setting_type
from gptray.data.rows import is_text, no_column
from gptray.data.sources import SourceFile

MAX_COLUMNS = 4096  # of JSON


@dataclass(frozen=True)
class InputColumns:
    """The columns to read from each batch of rows, and their fields in the output."""

    id_column: str | None  # None: the row's position
    id_field: pa.Field
    prompt_column: str | None  # None: prompts come from requests
    prompt_field: pa.Field
    settings: list[str]
    adapter_column: str | None
    passed: list[tuple[pa.Field, str]]  # a column of the input, its name in the output
    metadata: dict[bytes, bytes]
    notes: list[str]  # for the user, a line each

    def ids(self, batch: Batch, position: int) -> pa.Array:
        """The ids of a batch whose first row is at `position` in the input."""
        if self.id_column is None:
            return pa.array(range(position, position + batch.rows), self.id_field.type)
        if isinstance(batch, ObjectBatch) and pa.types.is_string(self.id_field.type):
            return pa.array(list(map(str, batch.values(self.id_column))), self.id_field.type)
        return batch.array(self.id_field.with_name(self.id_column))

    def prompts(self, batch: Batch, values: Sequence[object]) -> pa.Array:
        """The output column `prompt`; in a column of texts, any other prompt becomes JSON text."""
        is_declared = isinstance(batch, ArrowBatch) or holds_ids(self.prompt_field.type)
        if self.prompt_column is not None and is_declared:
            return batch.array(self.prompt_field.with_name(self.prompt_column))
        return pa.array(list(map(_as_text, values)), self.prompt_field.type)


class FoundColumns:
    """The columns of the files and rows examined so far."""

    def __init__(self, settings: GenerateConfig, prompt_column: str | None) -> None:
        """With `prompt_column` None, prompts and settings come from requests."""
        self.prompt_column = prompt_column
        self._config = settings
        self._files = 0
        self._fields: dict[str, pa.Field] = {}  # as files declare them
        self._sources: dict[str, list[str]] = {}  # the files that have a column
        self._csv_columns: set[str] = set()
        self._shapes: dict[str, Shape] = {}  # of the columns of JSON rows
        self._json_file = ""
        self._metadata: list[dict[bytes, bytes]] = []

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._fields, *self._shapes]))

    @property
    def id_column(self) -> str | None:
        """The column with the rows' ids. Raises UserError if the chosen one does not exist."""
        names, chosen = self.names, self._config.id_column
        if chosen is not None and chosen not in names:
            raise UserError(no_column(chosen, names, key="generate.id_column"))
        return chosen or ("id" if "id" in names else None)

    def declare(self, file: SourceFile) -> None:
        """Add a file's declared columns, or those of its first row. Raises UserError."""
        self._files += 1
        schema = declared_schema(file, self.prompt_column or "")
        if schema is None:
            self._first_row(file)
            return
        self._check_declared(file, schema)
        if file.format == "csv":
            self._csv_columns.update(schema.names)
        for field in schema:
            self._sources.setdefault(field.name, []).append(file.name)
            before = self._fields.get(field.name)
            self._fields[field.name] = self._common(before, field) if before else field
        self._metadata.append(dict(schema.metadata or {}))

    def take(self, batch: Batch) -> None:
        """Examine rows: all values of JSON, and the text columns of Parquet that the job reads."""
        if isinstance(batch, ArrowBatch):
            for name in (self.prompt_column or "", *setting_columns(self.names, self._config)):
                batch.check_text(name)
        if not isinstance(batch, ObjectBatch) or not is_json(batch.file):
            return
        for name in dict.fromkeys(key for row in batch.objects for key in row):
            self._shapes.setdefault(name, Shape())
        if len(self._shapes) > MAX_COLUMNS:
            raise UserError(
                f"{batch.file.name}: the rows have more than {MAX_COLUMNS:,} different keys, so "
                "the keys seem to be data; put them into an object under one key"
            )
        for name, shape in self._shapes.items():
            shape.take([row[name] for row in batch.objects if name in row])

    def check_names(self) -> None:
        """Raise UserError for names that clash with the job's own and types unfit for Parquet."""
        passed_names(self.names, self._config, self.id_column, self.prompt_column)
        if not self._shapes:  # a row of JSON need not have every key
            self._check_adapter_column()
        for name in self._shapes:
            if not is_utf8(name):
                raise UserError(
                    f"{self._json_file}: column {name!r}: its name holds half a surrogate pair, "
                    "which cannot be stored; rename it"
                )
        for name, problem in unwritable(self._fields.values()).items():
            raise UserError(f"{self._sources[name][0]}: column {name!r}: {problem}")

    def resolve(self) -> InputColumns:
        """Decide every column's field, after all rows were examined. Raises UserError."""
        self.check_names()
        self._check_adapter_column()
        ids, config = self.id_column, self._config
        passed = passed_names(self.names, config, ids, self.prompt_column)
        fields, notes = self._all_fields(), []
        told = [name for name in passed if name in self._shapes and holds_json(fields[name])]
        if told:
            names = ", ".join(told)
            notes.append(
                f"columns whose values fit no single type are stored as JSON text: {names}"
            )
        if ids in self._shapes and holds_json(fields[ids]):
            notes.append(f"the ids in column {ids!r} are stored as text")
        settings = setting_columns(self.names, config) if self.prompt_column else []
        wanted = config.settings_from_columns
        for name in wanted if isinstance(wanted, list) and self.prompt_column else []:
            if name not in settings:
                raise UserError(no_column(name, self.names, key="generate.settings_from_columns"))
        if settings and wanted is True:
            notes.append(
                f"columns that set how their row is sampled: {', '.join(settings)}; to only pass "
                "them through, set generate.settings_from_columns=false"
            )
        if "seed" in settings and "seed" not in passed and "seed" not in self._csv_columns:
            source = self._sources.get("seed", [self._json_file])[0]
            check_seed_type(fields["seed"], source)
        return InputColumns(
            ids,
            _own_field("id", None if ids is None else fields[ids], pa.int64()),
            self.prompt_column,
            _own_field("prompt", self._prompt_field(fields), pa.string()),
            settings,
            config.adapter_column,
            [(fields[name], new) for name, new in passed.items()],
            self._common_metadata(renamed=any(name != new for name, new in passed.items())),
            notes,
        )

    def _check_adapter_column(self) -> None:
        adapter = self._config.adapter_column
        if adapter is not None and adapter not in self.names:
            raise UserError(no_column(adapter, self.names, key="generate.adapter_column"))

    def _first_row(self, file: SourceFile) -> None:
        self._json_file = self._json_file or file.name
        first = first_row(file)
        if first is None:
            return
        place, values = first
        if self.prompt_column is not None and self.prompt_column not in values:
            problem = no_column(self.prompt_column, list(values), key="generate.prompt_column")
            raise UserError(f"{place}: {problem}")
        for name in values:
            self._shapes.setdefault(name, Shape())

    def _check_declared(self, file: SourceFile, schema: pa.Schema) -> None:
        prompt = self.prompt_column
        if prompt is not None and prompt not in schema.names:
            problem = no_column(prompt, schema.names, key="generate.prompt_column")
            problem += separator_hint(schema.names) if file.format == "csv" else ""
            raise UserError(f"{file.name}: {problem}")
        kinds = dict(zip(schema.names, schema.types, strict=True))
        kind = kinds.get(prompt, pa.null())
        if not _can_hold_prompts(kind):
            raise UserError(f"{file.name}: column {prompt!r} holds {kind}, not text or token ids")
        name = self._config.id_column or "id"
        if name in kinds:
            check_id_type(name, kinds[name], file.name)
        for name in setting_columns(schema.names, self._config) if prompt else []:
            check_setting_type(name, kinds[name], file.name)

    def _common(self, before: pa.Field, now: pa.Field) -> pa.Field:
        """One field for a column of two files. Raises UserError if the types differ."""
        kept = now if pa.types.is_null(before.type) else before
        other = before if kept is now else now
        if kept.type != other.type and not pa.types.is_null(other.type):
            first, *_, last = self._sources[now.name]
            raise UserError(
                f"column {now.name!r} holds {before.type} in {first} and {now.type} in {last}; "
                "convert one, or run them as two jobs"
            )
        return kept.with_nullable(before.nullable or now.nullable)

    def _all_fields(self) -> dict[str, pa.Field]:
        fields = {}
        for name, field in self._fields.items():
            everywhere = len(self._sources[name]) == self._files
            fields[name] = field if everywhere else field.with_nullable(True)
        for name, shape in self._shapes.items():
            kind = shape.type
            found = json_field(name) if kind is None else pa.field(name, kind)
            if kind is not None and unwritable([found]):
                found = json_field(name)
            if name in fields:
                found = self._with_json(fields[name], found)
            fields[name] = found
        return fields

    def _prompt_field(self, fields: Mapping[str, pa.Field]) -> pa.Field | None:
        """The prompts' declared field; None if only JSON rows have prompts, which become text."""
        if self.prompt_column is None or self.prompt_column not in self._fields:
            return None
        field = fields[self.prompt_column]
        return field if _can_hold_prompts(field.type) else None

    def _with_json(self, declared: pa.Field, found: pa.Field) -> pa.Field:
        """One field for a column that both JSON rows and other files have. Raises UserError."""
        if holds_json(found) and not pa.types.is_null(declared.type):
            raise UserError(
                f"column {found.name!r} holds {declared.type} in {self._sources[found.name][0]} "
                f"and values of several types in {self._json_file}; run them as two jobs"
            )
        self._sources[found.name].append(self._json_file)
        return self._common(declared, found)

    def _common_metadata(self, *, renamed: bool) -> dict[bytes, bytes]:
        """The metadata that all files share; pandas' only if no column was renamed."""
        first = self._metadata[0] if len(self._metadata) == self._files else {}
        return {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in self._metadata)
            and not (renamed and key == b"pandas")
        }


def _own_field(name: str, field: pa.Field | None, default: pa.DataType) -> pa.Field:
    """The field of an output column that is taken from the input's `field`."""
    if field is None:
        return pa.field(name, default)
    return pa.field(name, pa.string()) if holds_json(field) else field.with_name(name)


def holds_ids(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of token ids."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and bool(pa.types.is_integer(kind.value_type))


def _can_hold_prompts(kind: pa.DataType) -> bool:
    return is_text(kind) or holds_ids(kind) or bool(pa.types.is_null(kind))


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    return value if isinstance(value, str) and is_utf8(value) else json_text(value)
