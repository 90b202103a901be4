"""Reads a row's sampling settings from its columns; the sampler checks their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

import pyarrow as pa

from gptray.config import UserError
from gptray.config.yaml_text import plain_number
from gptray.data.json_columns import holds_json
from gptray.data.rows import is_text


def _whole(value: object) -> int:
    if isinstance(value, str):
        plain_number(value)  # `int` would take 1_0
        # Also 16.0, which pandas writes in an integer column with gaps.
        return int(value.strip().removesuffix(".0"))
    number = _number(value)
    whole = int(value if isinstance(value, int) else number)
    if isinstance(value, (float, Decimal)) and whole != value:
        raise ValueError("not a whole number")
    return whole


def _number(value: object) -> float:
    if isinstance(value, str):
        return plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise ValueError("not a number")
    return float(value)


def _flag(value: object) -> bool:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.strip().lower()]
    if value not in (True, False):
        raise ValueError("not true or false")
    return bool(value)


def _stops(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("not texts")
    return value


def _ids(value: object) -> list[int]:
    return [_whole(one) for one in (value if isinstance(value, list) else [value])]


READERS: dict[str, Callable[[object], object]] = {
    "max_new_tokens": _whole,
    "min_new_tokens": _whole,
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "stop": _stops,
    "stop_token_ids": _ids,
    "include_stop_str_in_output": _flag,
    "skip_special_tokens": _flag,
    "utf8": _flag,
    "seed": _whole,
}


def read_settings(given: Mapping[str, object]) -> tuple[dict[str, object], str | None]:
    """A row's settings, without nulls and empty text; and a message if some cannot be read."""
    own: dict[str, object] = {}
    problems = []
    for name, value in given.items():
        if value is None or value == "":
            continue
        try:
            own[name] = READERS[name](value)
        except (TypeError, KeyError, ValueError, OverflowError):
            problems.append(f"{name}={value!r} is not {_WANTED[READERS[name]]}")
    return own, "; ".join(problems) or None


_WANTED: dict[Callable[[object], object], str] = {
    _whole: "a whole number", _number: "a number", _flag: "true or false",
    _stops: "text or a list of texts", _ids: "a token id or a list of them",
}  # fmt: skip


def check_setting_type(name: str, kind: pa.DataType, source: str) -> None:
    """Raise UserError for a column whose type cannot hold a setting."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = [
        pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating,
        pa.types.is_decimal, is_text,
    ]  # fmt: skip
    if name in ("stop", "stop_token_ids"):
        checks += [pa.types.is_list, pa.types.is_large_list]
    if not any(is_kind(plain) for is_kind in checks):
        raise UserError(
            f"{source}: column {name!r} holds {kind}, but would set {name} for its row; to pass "
            "it through unchanged, leave it out of generate.settings_from_columns"
        )


def check_seed_type(field: pa.Field, source: str) -> None:
    """Raise UserError for a column `seed` that does not fit the output's integer column."""
    if not pa.types.is_integer(field.type) and not pa.types.is_null(field.type):
        held = "values of several types" if holds_json(field) else field.type
        raise UserError(
            f"{source}: column 'seed' holds {held}, but the output's seed holds integers; "
            "convert it, or set generate.prefix=input_ to pass it through as input_seed as well"
        )
