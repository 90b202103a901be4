"""The text of --help: a job's usage, and every key with its default, type and meaning.

Generated from the config tree's own descriptions, so it cannot go out of date.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from gptray.config.keys import FieldSpec, field_specs, shown

OPTIONS = """\
options:
  --config FILE        YAML with the keys below, such as configs/lora.yaml
  section.field=value  set one key; overrides the file and the defaults
  --dry-run            print what would happen, and the non-default keys
  --verbose            show debug lines and Ray's own log
  --help               this text

Quote what the shell would change: 'data.source=texts/*.txt' 'sample.prompt=a b'

exit codes: 0 done, 1 the run failed, 2 a wrong key or file, 130 interrupted.
The last line of stdout is one JSON object; everything else goes to stderr."""


def help_text(root: type[BaseModel], *, command: str, doc: str) -> str:
    """Return a job's help, wrapped to the terminal's width (80 to 120 columns)."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    usage = f"usage: {command} [--config FILE] [section.field=value ...]"
    return "\n\n".join([usage, doc.strip(), OPTIONS, "\n".join(_keys(root, width))])


def _keys(root: type[BaseModel], width: int) -> Iterator[str]:
    """Yield the lines of all keys, section by section."""
    section = None
    bold = "NO_COLOR" not in os.environ and sys.stdout.isatty()
    yield "keys and their defaults:"
    for key, spec in field_specs(root).items():
        head = key.rpartition(".")[0]
        if head != section:
            yield ""
            if head:
                yield f"\033[1m{head}:\033[0m" if bold else f"{head}:"
            section = head
        yield from _entry(spec, width)


def _entry(spec: FieldSpec, width: int) -> Iterator[str]:
    """Yield one key: name and default on the left, type and meaning wrapped on the right."""
    column = 36
    left = f"  {spec.key}={shown(spec.default).strip(chr(39))}"
    meaning = f"({spec.type_words}) {spec.description}"
    lines = textwrap.wrap(meaning, width - column, break_on_hyphens=False)
    if len(left) >= column:
        yield left
        left = ""
    for line in lines:
        yield f"{left:<{column}}{line}"
        left = ""
