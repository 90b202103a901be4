"""Converts YAML nodes to Python values, by the types that a key takes."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from gptray.config.keys import FieldSpec
from gptray.config.yaml_text import Plain, YamlError, parse_node, scalar_value


def argument_node(text: str, spec: FieldSpec) -> yaml.Node:
    """Parse a value given on the command line.

    If the key takes text, the argument is the text, so that *.txt, a: b and # c need no quotes;
    only null, quoted text, a list in brackets and a map in braces are then parsed as YAML.
    """
    literal = yaml.ScalarNode("tag:yaml.org,2002:str", text)
    takes_text = _takes_text(spec.kinds)
    try:
        node = parse_node(text)
    except YamlError as error:
        if not takes_text:
            raise
        if spec.items and text.startswith("[") and text.endswith("]"):
            raise YamlError(f"{error.message}; quote the items of the list", 1) from None
        if dict in spec.kinds and text.startswith("{") and text.endswith("}"):
            raise YamlError(f"{error.message}; quote the entries of the map", 1) from None
        return literal
    if node is None:
        return literal
    if not takes_text:
        return node
    if isinstance(node, yaml.CollectionNode) and node.flow_style:
        is_wanted = bool(spec.items) if isinstance(node, yaml.SequenceNode) else dict in spec.kinds
        return node if is_wanted else literal
    whole = node.end_mark.index == len(text) and node.start_mark.index == 0
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    return node if whole and (quoted or is_null(node)) else literal


def node_value(node: yaml.Node, kinds: Sequence[type], items: Sequence[type]) -> Plain:
    """Return a node's Python value for a key of these kinds."""
    if isinstance(node, yaml.MappingNode):
        return {}
    if isinstance(node, yaml.SequenceNode):
        values = [node_value(item, items, ()) for item in node.value]
        return tuple(values) if tuple in kinds else values
    assert isinstance(node, yaml.ScalarNode)
    value = scalar_value(node)
    if value is None:
        return None
    if _takes_text(kinds):
        return str(node.value)
    if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 steps
    return value


def _takes_text(kinds: Sequence[type]) -> bool:
    """Whether values are text whatever they look like; not so for auto|true|false."""
    return str in kinds and bool not in kinds


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and scalar_value(node) is None


def line_of(node: yaml.Node) -> int:
    """Return a node's line, counted from 1."""
    return int(node.start_mark.line) + 1
