"""Keeps validation and test text out of the training text, and says which files look like some."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from gptray.config import UserError
from gptray.data.sources import Source, SourceFile
from gptray.data.split import LONG_NAMES, SPLITS, TEST, VAL

_NAMES = {
    VAL: re.compile(r"(val|valid|validation|dev|eval)(?![a-z])"),
    TEST: re.compile(r"test(?![a-z])"),
}
_KEYS = {VAL: "data.val_source", TEST: "data.test_source"}


def hold_out(source: Source, own: Mapping[int, Source]) -> tuple[Source, list[str]]:
    """Remove the files of `own` (by label) from `source`; return it, and warnings.

    Raises UserError where nothing is left, or validation and test share a file.
    """
    if not source.files and any(not text.files for text in own.values()):
        raise UserError(f"{source.key} is builtin, and so is validation or test text")
    held = _by_place(own.values())
    taken = [file for file in source.files if held and file.place in held]
    warnings = []
    if taken:
        keys = " and ".join(sorted({held[file.place] for file in taken}))
        if len(taken) == len(source.files):
            raise UserError(f"{source.key}: all of its files are in {keys} too; nothing is left")
        warnings.append(f"{_listed(taken)}: in {source.key} and in {keys}; not trained on")
        source = replace(source, files=tuple(f for f in source.files if f not in taken))
    return source, warnings + _look_alikes(source, own)


def _by_place(sources: Iterable[Source]) -> dict[str, str]:
    """The key that names each file, by where the file is."""
    held: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            other = held.setdefault(file.place, source.key)
            if other != source.key:
                raise UserError(f"{source.key}: {file.name} is in {other} too; leave it in one")
    return held


def _look_alikes(source: Source, own: Mapping[int, Source]) -> list[str]:
    """Warnings for files called like validation or test text among others that are not."""
    warnings = []
    for label, names in _NAMES.items():
        alike = [f for f in source.files if names.match(PurePosixPath(f.path).name.lower())]
        if label not in own and 0 < len(alike) < len(source.files):
            kind = LONG_NAMES[SPLITS[label]]
            warnings.append(
                f"{_listed(alike)}: called like {kind} text, yet {source.key} is split and "
                f"most of it is trained on; {_KEYS[label]}={alike[0].name} keeps it for {kind}"
            )
    return warnings


def _listed(files: Sequence[SourceFile]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return files[0].name + more
