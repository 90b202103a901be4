"""The search space of a sweep: reads its entries and reports every mistake in them.

An entry is a mapping: `path` (or `paths`, which share each value, or get one each from a list),
one of KINDS with its values, and `when`, a condition on a path of an earlier entry. The config
tree says which keys there are and what they take; `gptray.tuning.draws` draws the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from pydantic import BaseModel

from gptray.config.keys import EntryProblem, FieldSpec, complaint, field_specs, shown
from gptray.config.suggest import did_you_mean, nearest, nearest_keys

# Named as in Ray Tune; randint excludes its upper bound.
RANGES = ("uniform", "loguniform", "randint")
KINDS = ("choice", "grid", *RANGES)
WORDS = ("path", "paths", *KINDS, "when")

_UNTRAINED = "it does not affect training"
_OTHER_TEXT = "trials would be validated on different text"
NOT_TUNED = {
    "name": "every trial has its own",
    "storage_path": "every trial has its own",
    **dict.fromkeys(
        (
            "data.source",
            "data.test_source",
            "data.text_column",
            "data.separator",
            "data.encoding",
            "data.seed",
        ),
        _OTHER_TEXT,
    ),
    "model.init_from": "all trials start from the same weights",
    "train.eval_interval": "trials are compared at the same steps",
    "train.log_interval": _UNTRAINED,
    "train.async_validation": _UNTRAINED,
    "train.resume": _UNTRAINED,
    "train.teachers": "all trials have the same teachers",
    **dict.fromkeys(
        ("compute.", "track.", "sample.", "generate.", "evaluate.", "serve.", "export.", "tune."),
        _UNTRAINED,
    ),
}


@dataclass(frozen=True)
class Entry:
    """One dimension of the space.

    options: those of a choice or grid, each with a value per path.
    low, high: the bounds of a range; randint excludes `high`.
    when: by path, the values for which this entry is active.
    """

    paths: tuple[str, ...]
    kind: str
    options: tuple[tuple[object, ...], ...] = ()
    low: float = 0.0
    high: float = 0.0
    when: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def is_active(self, values: Mapping[str, object]) -> bool:
        """Whether `when` holds for these values of the earlier entries."""
        return all(path in values and values[path] in any_of for path, any_of in self.when.items())

    def at(self, quantile: float) -> dict[str, object]:
        """The value of each path at a quantile in [0, 1) of the distribution, to four digits."""
        if self.options:
            option = self.options[min(int(quantile * len(self.options)), len(self.options) - 1)]
            return dict(zip(self.paths, option, strict=True))
        if self.kind == "randint":
            number = int(self.low + quantile * (self.high - self.low))
            return dict.fromkeys(self.paths, min(number, int(self.high) - 1))
        if self.kind == "loguniform":
            low, high = math.log(self.low), math.log(self.high)
            value = math.exp(low + quantile * (high - low))
        else:
            value = self.low + quantile * (self.high - self.low)
        return dict.fromkeys(self.paths, min(self.high, max(self.low, float(f"{value:.4g}"))))

    def can_be(self, path: str, value: object) -> bool:
        """Whether the entry can give a path this value."""
        if self.options:
            place = self.paths.index(path)
            return value in [option[place] for option in self.options]
        return is_number(value) and self.low <= value <= self.high


def read_space(space: Sequence[Mapping[str, object]], root: type[BaseModel]) -> list[Entry]:
    """The entries of a valid space: the config's validation has checked it."""
    reading = _SpaceReader(space, root)
    assert not reading.problems, reading.problems
    return reading.entries


def space_problems(
    space: Sequence[Mapping[str, object]], root: type[BaseModel]
) -> list[EntryProblem]:
    """All problems of a space whose paths are keys of a config tree."""
    return _SpaceReader(space, root).problems


class _SpaceReader:
    """Reads the entries of one space in order: those without problems, and all problems."""

    def __init__(self, space: Sequence[Mapping[str, object]], root: type[BaseModel]) -> None:
        self._root = root
        self._specs = field_specs(root)
        self._seen: dict[str, tuple[int, Entry]] = {}
        self.entries: list[Entry] = []
        self.problems: list[EntryProblem] = []
        for self._number, raw in enumerate(space):
            self._read(raw)

    def _read(self, raw: Mapping[str, object]) -> None:
        before = len(self.problems)
        for word in raw:
            if word not in WORDS:
                close = did_you_mean(nearest(word, WORDS, cutoff=0.5))
                self._problem(word, f"unknown word {word}{close}")
        paths = self._paths(raw)
        kind = self._kind(raw)
        entry = self._values(paths, kind, raw[kind]) if paths and kind else None
        when = self._when(raw.get("when", {}), is_grid=kind == "grid")
        if entry is None:
            return
        entry = replace(entry, when=when)
        self._seen |= dict.fromkeys(paths, (self._number, entry))
        if len(self.problems) == before:
            self.entries.append(entry)

    def _problem(self, word: str | None, message: str) -> None:
        self.problems.append(EntryProblem(self._number, word, message))

    def _paths(self, raw: Mapping[str, object]) -> tuple[str, ...]:
        """The entry's paths; empty if one of them is wrong."""
        if ("path" in raw) == ("paths" in raw):
            self._problem(None, "needs either path or paths, such as path: model.dropout")
            return ()
        word = "path" if "path" in raw else "paths"
        paths = [raw[word]] if word == "path" else raw[word]
        if not isinstance(paths, list) or not paths:
            self._problem(word, "paths expects a list, such as [model.n_layer, model.n_embd]")
            return ()
        problems = [problem for path in paths for problem in self._path_problems(path)]
        problems += ["paths names a path twice"] if len(set(map(str, paths))) < len(paths) else []
        for problem in problems:
            self._problem(word, problem)
        return () if problems else tuple(paths)

    def _path_problems(self, path: object) -> Iterator[str]:
        if not isinstance(path, str) or path not in self._specs:
            yield f"unknown path {path}{did_you_mean(*nearest_keys(str(path), list(self._specs)))}"
            return
        for prefix, why in NOT_TUNED.items():
            if path == prefix or (prefix.endswith(".") and path.startswith(prefix)):
                yield f"{path} cannot be part of a space: {why}"
        if path in self._seen:
            yield f"{path} already has an entry (number {self._seen[path][0] + 1})"

    def _kind(self, raw: Mapping[str, object]) -> str | None:
        kinds = [word for word in KINDS if word in raw]
        if len(kinds) == 1:
            return kinds[0]
        if len(kinds) > 1:
            self._problem(kinds[1], f"has {' and '.join(kinds)}; give only one of them")
        elif all(word in WORDS for word in raw):
            self._problem(None, f"needs one of {', '.join(KINDS)}")
        return None

    def _values(self, paths: tuple[str, ...], kind: str, given: object) -> Entry | None:
        if kind not in RANGES:
            if not isinstance(given, list) or not given:
                self._problem(kind, f"{kind} expects a list of values, such as [0.0, 0.1, 0.2]")
                return None
            options = tuple(self._option(paths, kind, value) for value in given)
            return Entry(paths, kind, options)
        wrong = f"{kind} expects a lower and an upper bound, such as "
        wrong += "[2, 9]" if kind == "randint" else "[0.1, 0.5]"
        if not (isinstance(given, list) and len(given) == 2 and all(map(is_number, given))):
            self._problem(kind, f"{wrong}; got {shown(given)}")
            return None
        low, high = given
        if not low < high:
            self._problem(kind, f"{wrong}; {shown(low)} is not below {shown(high)}")
        elif kind == "loguniform" and low <= 0:
            self._problem(kind, f"{wrong}; {shown(low)} is not above 0")
        elif kind == "randint" and not (float(low).is_integer() and float(high).is_integer()):
            self._problem(kind, f"{wrong}; got {shown(given)}")
        else:
            self._check_ends(paths, kind, low, high)
        return Entry(paths, kind, low=low, high=high)

    def _check_ends(self, paths: tuple[str, ...], kind: str, low: float, high: float) -> None:
        ends = [int(low), int(high) - 1] if kind == "randint" else [float(low), float(high)]
        for path in paths:
            kinds = self._specs[path].kinds
            if kind != "randint" and int in kinds and float not in kinds:
                self._problem(kind, f"{path} takes whole numbers; write randint or choice")
                continue
            for end in ends:
                self._check(path, kind, end)

    def _option(self, paths: tuple[str, ...], word: str, value: object) -> tuple[object, ...]:
        """One option as a value per path."""
        values = [value] * len(paths)
        if len(paths) > 1 and isinstance(value, list):
            values = value
            if len(value) != len(paths):
                self._problem(
                    word,
                    f"{shown(value)} has {len(value)} values for {len(paths)} paths; give one "
                    "each, or one for all",
                )
                return tuple(value)
        values = [_as_whole(one, self._specs[p]) for p, one in zip(paths, values, strict=True)]
        for path, one in zip(paths, values, strict=True):
            self._check(path, word, one)
        return tuple(values)

    def _check(self, path: str, word: str, value: object) -> None:
        wrong = complaint(self._root, self._specs[path], value)
        if wrong:
            self._problem(word, f"{path}: {wrong}")

    def _when(self, given: object, *, is_grid: bool) -> dict[str, Sequence[object]]:
        if not isinstance(given, dict):
            self._problem("when", "when expects a path and its value, such as {model.norm: none}")
            return {}
        return {
            path: self._condition(path, value, is_grid=is_grid) for path, value in given.items()
        }

    def _condition(self, path: str, value: object, *, is_grid: bool) -> Sequence[object]:
        """The values of an earlier entry's path for which this entry is active."""
        if path not in self._seen:
            names = did_you_mean(nearest(path, self._seen))
            self._problem("when", f"when: no entry before this one varies {path}{names}")
            return ()
        entry = self._seen[path][1]
        if is_grid and entry.kind != "grid":
            self._problem(
                "when", f"when: a grid can depend only on grids; {path} is drawn at random"
            )
        listed = [value]
        if isinstance(value, list) and not entry.can_be(path, value):
            listed = value
        any_of = [_as_whole(one, self._specs[path]) for one in listed]
        for one in any_of:
            if not entry.can_be(path, one):
                place = entry.paths.index(path)
                texts = [str(option[place]) for option in entry.options]
                names = did_you_mean(nearest(str(one), texts))
                self._problem("when", f"when: {path} is never {shown(one)} here{names}")
        return any_of


def _as_whole(value: object, spec: FieldSpec) -> object:
    """Turn 1e3 into 1000 for a key that takes whole numbers."""
    is_whole = int in spec.kinds and float not in spec.kinds
    if is_whole and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
