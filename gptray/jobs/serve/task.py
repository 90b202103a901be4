"""What a replica is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.config import Config


@dataclass(frozen=True)
class ReplicaTask:
    """An endpoint's config. keys: digests of the API keys, as their file had them at the start.

    threads: of PyTorch.
    """

    config: Config
    keys: Sequence[str]
    threads: int
