"""What an engine's process is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptray.config import Config


@dataclass(frozen=True)
class GenerateTask:
    """Continue the parts of a job's input, with so many threads.

    config: checked by the driver. model, output: a folder that every node sees, or a URI.
    model_name, metadata: for the files, as column and key-values.
    """

    config: Config
    threads: int
    model: str
    model_name: str
    output: str
    metadata: Mapping[str, str]
