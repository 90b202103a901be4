"""YAML as configs use it: YAML 1.2's scalars, and everything else refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gptray.config.yaml_text import MAX_BYTES, YamlError, parse_node, read_node, scalar_value


def value_of(text: str) -> Any:
    node = parse_node(text)
    assert isinstance(node, yaml.ScalarNode)
    return scalar_value(node)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("6E5", 6e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+2", -150.0),
        (".inf", float("inf")),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("90:10", "90:10"),
        ("80:10:10", "80:10:10"),
        ("1:30.5", "1:30.5"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("n", "n"),
        ("none", "none"),
        ("1_000", "1_000"),
        ("2026-11-22", "2026-11-22"),
        ("=", "="),
        ('"3e-4"', "3e-4"),
        ("'null'", "null"),
        ("nan", "nan"),
    ],
)
def test_plain_scalar_follows_yaml_1_2(text: str, value: Any) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: &x 2\n", 2, "anchors"),
        ("a: 1\nb: *x\n", 2, "anchors"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "tags"),
        ("a: !mine 2\n", 1, "tags"),
        ("a: !!str 2\n", 1, "tags"),
        ("a:\n\tb: 1\n", 2, "tab"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\nb: c: d\n", 2, "second ': '"),
        ("a: 1\nb: [1, 2\n", 3, "flow sequence"),
        ("a: 1\nb: \x07\n", 2, "control character"),
        ("a: " + "[" * 2000 + "]" * 2000, 1, "too deeply"),
    ],
)
def test_other_yaml_is_refused_with_its_line(text: str, line: int, word: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_node(text)
    assert word in caught.value.message
    assert caught.value.line == line
    assert "\n" not in caught.value.message


def test_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(YamlError, match="anchors"):
        parse_node("\n".join(lines))


def test_file_above_the_cap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_text("# " + "x" * MAX_BYTES)
    with pytest.raises(YamlError, match="too large"):
        read_node(path)


def test_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: a\n# caf\xe9\n")
    with pytest.raises(YamlError, match="UTF-8") as caught:
        read_node(path)
    assert caught.value.line == 2


@pytest.mark.parametrize("raw", [b"", b"# only a comment\n", b"\xef\xbb\xbf"])
def test_empty_file_has_no_node(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "empty.yaml"
    path.write_bytes(raw)
    assert read_node(path) is None
