"""The YAML of configs: YAML 1.2's core schema, with the line of every value.

3e-4 is a number, 90:10 and off are text; a tag, an anchor or a second document is an error.
`gptray.config.reader` knows the keys and what their values mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16

Scalar = None | bool | int | float | str
# A value read from YAML; a tuple if the key takes one.
Plain: TypeAlias = "Scalar | list[Plain] | tuple[Plain, ...] | dict[str, Plain]"

_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
CORE_SCALARS = {
    "null": (r"null|Null|NULL|~|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]{1,99}|0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99}", "-+0123456789"),
    "float": (
        rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class YamlError(ValueError):
    """Invalid YAML, or YAML that configs do not allow; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `scalar_value` makes the values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise YamlError("anchors (&) and aliases (*) are not supported; quote the text", line)
        if getattr(event, "tag", None) is not None:
            raise YamlError(f"tags are not supported: {event.tag}; quote the text", line)
        if self.depth > MAX_DEPTH:
            raise YamlError("nested too deeply", line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind, (_pattern, _first) in CORE_SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(rf"^(?:{_pattern})$"),
        [*_first, ""] if _kind == "null" else list(_first),
    )


class _Dumper(yaml.SafeDumper):
    """Double-quotes text with line breaks or control characters, so that it survives."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def write_yaml(values: Mapping[str, object]) -> str:
    """Return plain values as YAML, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def read_written(path: Path) -> object:
    """Read a file that `write_yaml` wrote, with libyaml: fast, but without line numbers.

    Raises yaml.YAMLError, ValueError, OSError.
    """
    loader = yaml.CSafeLoader(path.read_bytes())
    return loader.get_single_data()


def read_node(path: Path) -> yaml.Node | None:
    """Return the root node of a YAML file, None if the file is empty; raise YamlError, OSError."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise YamlError(f"too large for a config (at most {MAX_BYTES} bytes)", 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlError("not UTF-8 text", line) from None
    return parse_node(text)


def parse_node(text: str) -> yaml.Node | None:
    """Return the root node of the text, None if it is empty; raise YamlError."""
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"control character #x{ord(text[error.position]):02x}", line) from None
    except yaml.MarkedYAMLError as error:
        raise _explained(error) from None


def scalar_value(node: yaml.ScalarNode) -> Scalar:
    """Return a scalar's value: text if quoted, else by YAML 1.2's core schema."""
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    return text


def plain_number(text: str) -> float:
    """Parse a number by YAML's rules: no 1_0 and no digits of other scripts.

    Raises ValueError.
    """
    text = text.strip()
    if not re.fullmatch(_NUMBER, text):
        raise ValueError(f"not a number: {text!r}")
    return float(text)


def _explained(error: yaml.MarkedYAMLError) -> YamlError:
    """Turn one of PyYAML's errors into one line."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = str(error.problem)
    if "'\\t'" in problem:
        return YamlError("a tab character; indent with spaces", line)
    if "but found another document" in problem:
        return YamlError("a second document (---); a config has only one", line)
    if "mapping values are not allowed" in problem:
        return YamlError(
            "a second ': ' here, or wrong indentation; quote text that contains ': '", line
        )
    context = f" ({error.context})" if error.context else ""
    return YamlError(f"not valid YAML: {problem}{context}", line)
