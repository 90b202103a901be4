"""Reads YAML and the command line into a validated config, or reports every mistake.

Works on any tree of pydantic sections and knows no key by name. The tree and its rules are in
`gptray.config.schema`, spelling suggestions in `gptray.config.suggest`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gptray.config.errors import ConfigError
from gptray.config.keys import EntriesError, field_specs, shown
from gptray.config.nodes import argument_node, is_null, line_of, node_value
from gptray.config.suggest import did_you_mean, nearest, nearest_keys
from gptray.config.yaml_text import Plain, YamlError, read_node, scalar_value

COMMAND_LINE = "command line"
_CONFIGS = Path("configs")
_SHIPPED = Path(__file__).parent.parent / _CONFIGS

Root = TypeVar("Root", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """A value that was set: its valid key, where it was set, and the Python value."""

    key: str
    where: str
    value: object
    node: yaml.Node | None = None


class Reader:
    """Collects values for the keys of one tree, and the mistakes in them."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.specs = field_specs(root)
        self.sections = sorted({key.split(".")[0] for key in self.specs if "." in key})
        self.given: dict[str, Given] = {}
        self._problems: list[tuple[float, str]] = []

    @property
    def problems(self) -> list[str]:
        """All mistakes so far, first those in the file, by line."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    def read_file(self, path: str) -> None:
        """Read every key of a YAML file. Expands ~, which shells leave in --config=~/my.yaml.

        A path such as configs/lora.yaml that does not exist is the shipped config of that name.
        """
        file = Path(os.path.expanduser(path))
        shipped = _SHIPPED / file.name
        if file.parent == _CONFIGS and not file.exists() and shipped.exists():
            file = shipped
        try:
            node = read_node(file)
        except YamlError as error:
            self._problem(f"{path}:{error.line}", error.message)
            return
        except OSError as error:
            self._problem(path, _unreadable(file, error))
            return
        if node is None or is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            self._problem(f"{path}:{line_of(node)}", "expects sections and keys, such as optim:")
            return
        for name, where, value in self._pairs(node, path, ""):
            section = self._section(name, where, value)
            if section is None:
                self._take(name, where, value)
            elif isinstance(value, yaml.MappingNode):
                for key, place, inner in self._pairs(value, path, f"{section}."):
                    self._take(key, place, inner)

    def read_argument(self, argument: str) -> None:
        """Read one section.field=value of the command line."""
        key, equals, text = argument.partition("=")
        key = key.strip()
        spec = self.specs.get(key)
        if equals and not key:
            self._problem(COMMAND_LINE, f"{argument}: no key before =; put no spaces around it")
        elif spec is None:
            self._unknown(key, COMMAND_LINE, argument)
        elif not equals or not text:
            # The shell removes one pair of quotes.
            example = "'\"\"'" if spec.example == "" else shown(spec.example)
            self._problem(COMMAND_LINE, f"{key} has no value, such as {key}={example}")
        elif any("\ud800" <= character <= "\udfff" for character in text):
            self._problem(COMMAND_LINE, f"{key}: not UTF-8 text")
        else:
            try:
                node = argument_node(text, spec)
            except YamlError as error:
                self._problem(COMMAND_LINE, f"{key}={text}: {error.message}")
            else:
                self._take(key, COMMAND_LINE, node)

    def read_value(self, key: str, value: object) -> None:
        """Take a value that is already a Python object."""
        if key not in self.specs:
            self._unknown(key, "")
        else:
            if isinstance(value, list) and tuple in self.specs[key].kinds:
                value = tuple(value)
            self.given[key] = Given(key, "", value)

    def _section(self, name: str, where: str, value: yaml.Node) -> str | None:
        """Return the section that a top-level key means, None if it is not a section."""
        if name in self.sections:
            if not isinstance(value, yaml.MappingNode) and not is_null(value):
                inside = next(key for key in self.specs if key.startswith(f"{name}."))
                self._problem(
                    where, f"{name} is a section; put its keys under it, such as {inside}"
                )
            return name
        close = nearest(name, self.sections)
        if name in self.specs or not isinstance(value, yaml.MappingNode):
            return None
        self._problem(where, f"unknown section {name}{did_you_mean(close)}")
        # Its keys are checked against the section that was probably meant.
        return close or name

    def _pairs(
        self, node: yaml.MappingNode, path: str, prefix: str
    ) -> Iterator[tuple[str, str, yaml.Node]]:
        """Yield the dotted key, place and value of each entry of a mapping, each key once."""
        first_lines: dict[str, int] = {}
        for key_node, value in node.value:
            where = f"{path}:{line_of(key_node)}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(where, "a key must be a plain name")
                continue
            key = f"{prefix}{key_node.value}"
            if key in first_lines:
                self._problem(where, f"{key} is given twice (first on line {first_lines[key]})")
                continue
            first_lines[key] = line_of(key_node)
            yield key, where, value

    def _take(self, key: str, where: str, node: yaml.Node) -> None:
        spec = self.specs.get(key)
        if spec is None:
            self._unknown(key, where)
            return
        before = self.given.get(key)
        if before and (before.where == COMMAND_LINE) == (where == COMMAND_LINE):
            self._problem(where, f"{key} is given twice")
        is_text = isinstance(node, yaml.ScalarNode) and str in spec.kinds
        has_keys = dict in (*spec.kinds, *spec.items) and not is_text
        value = self._plain(node, where) if has_keys else None
        self.given[key] = Given(key, where, value or node_value(node, spec.kinds, spec.items), node)

    def _plain(self, node: yaml.Node, where: str) -> Plain:
        """Return a node's value whatever its key: lists, mappings with each key once, scalars."""
        path = where if where == COMMAND_LINE else where.rpartition(":")[0]
        if isinstance(node, yaml.MappingNode):
            pairs = self._pairs(node, path, "")
            return {key: self._plain(value, place) for key, place, value in pairs}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, where) for item in node.value]
        assert isinstance(node, yaml.ScalarNode)
        return scalar_value(node)

    def _unknown(self, key: str, where: str, argument: str = "") -> None:
        if argument.endswith((".yaml", ".yml")) and "=" not in argument:
            self._problem(where, f"{argument} is not a key; did you mean --config {argument}?")
            return
        if key in self.sections:
            inside = next(name for name in self.specs if name.startswith(f"{key}."))
            self._problem(where, f"{key} is a section; set one of its keys, such as {inside}=...")
            return
        names = did_you_mean(*nearest_keys(key, list(self.specs)))
        self._problem(where, f"unknown key {key}{names}")

    def _problem(self, where: str, message: str) -> None:
        line = re.search(r":(\d+)(,|$)", where)
        rank = int(line[1]) if line else math.inf
        self._problems.append((rank, f"{where}: {message}" if where else message))

    def build(self, root: type[Root]) -> Root:
        """Return the validated tree. Raises ConfigError with all mistakes.

        Leaves out a wrong value and validates the rest again, so that rules across keys are
        checked on the valid ones and all mistakes are reported at once.
        """
        left_out: set[str] = set()
        while True:
            values = {key: given.value for key, given in self.given.items() if key not in left_out}
            try:
                tree = root.model_validate(nested(values), strict=True)
            except ValidationError as error:
                found = self._explain(error, left_out)
                if found - left_out:
                    left_out |= found
                    continue
            if self._problems:
                raise ConfigError(self.problems)
            return tree

    def _explain(self, error: ValidationError, left_out: set[str]) -> set[str]:
        """Add a problem for each wrong key or broken rule; return the given keys involved."""
        keys: set[str] = set()
        for detail in error.errors(include_url=False):
            parts = [str(part) for part in detail["loc"]]
            keys_within = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            key = next((one for one in keys_within if one in self.specs), None)
            rule = detail.get("ctx", {}).get("error")
            if isinstance(rule, EntriesError):
                keys |= self._explain_entries(rule)
            elif key is None:  # the whole section
                keys |= self._explain_rule(str(rule), left_out)
            elif key not in keys:  # a union has an error for each of its members
                given = self.given[key]
                complaint = self.specs[key].complaint(given.value, detail)
                self._problem(given.where, f"{key}: {complaint}")
                keys.add(key)
        return keys

    def _explain_rule(self, message: str, left_out: set[str]) -> set[str]:
        """Add the problem of a rule across keys, unless one of them is already wrong."""
        named = [name for name in re.findall(r"[a-z_]+\.[a-z0-9_]+", message) if name in self.specs]
        given = [self.given[name] for name in named if name in self.given]
        if not left_out.intersection(named):
            places = dict.fromkeys(one.where for one in given if one.where)
            self._problem(", ".join(places), message)
        return {one.key for one in given}

    def _explain_entries(self, error: EntriesError) -> set[str]:
        """Add each problem of a key's list of entries, with its own line; return the key."""
        given = self.given[error.key]
        for entry, word, message in error.problems:
            item = given.node.value[entry] if given.node else None
            if given.where in ("", COMMAND_LINE) or item is None:
                self._problem(given.where, f"{error.key}, entry {entry + 1}: {message}")
                continue
            keys = [name for name, _ in item.value if name.value == word]
            line = line_of(keys[0] if keys else item)
            self._problem(f"{given.where.rpartition(':')[0]}:{line}", f"{error.key}: {message}")
        return {error.key}


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """Turn dotted keys into sections."""
    tree: dict[str, object] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        inside = tree.setdefault(section, {}) if section else tree
        assert isinstance(inside, dict)
        inside[name] = value
    return tree


def _unreadable(path: Path, error: OSError) -> str:
    """Say why a file cannot be read; if it is missing, suggest others."""
    if isinstance(error, IsADirectoryError):
        of_run = Path(path) / "config.yaml"
        return "is a folder" + (did_you_mean(str(of_run)) if of_run.is_file() else "")
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {error.strerror}"
    folder = path.parent
    known = {item: str(_CONFIGS / item) for item in [*_yaml_in(_SHIPPED), *_yaml_in(_CONFIGS)]}
    beside = (
        known if folder == _CONFIGS else {item: str(folder / item) for item in _yaml_in(folder)}
    )
    found = known | beside if folder == Path() else beside
    close = nearest(path.name, found)
    if close:
        return f"no such file{did_you_mean(found[close])}"
    if beside:
        return f"no such file; {folder} has {', '.join(list(beside)[:8])}"
    return "no such file" if folder.is_dir() else f"no such file; there is no folder {folder}"


def _yaml_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.glob("*.y*ml"))
