"""What the actors of an evaluation are given, are asked for, and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptray.config import Config


@dataclass(frozen=True)
class EvaluationTask:
    """The models and the tokens that an actor works on, with so many threads.

    models: folders that every node sees, or URIs. also: tokens of evaluate.also's texts, by name.
    """

    config: Config
    models: list[str]
    data_dir: Path
    also: Mapping[str, Path]
    block_size: int
    threads: int


@dataclass(frozen=True)
class Call:
    """A call of one of `Scorer`'s methods, and how many tokens it is about."""

    method: str
    arguments: tuple[Any, ...]
    tokens: int


@dataclass(frozen=True)
class Continuation:
    """What the model has written."""

    tokens: list[int]
    text: str
