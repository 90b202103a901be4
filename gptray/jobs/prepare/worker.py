"""What a task of Ray Data does with one unit of a text: read it, sample it, or tokenise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptray.data.pieces import Piece
from gptray.data.shards import Shard
from gptray.data.split_plan import PiecePlan
from gptray.data.work import UnitScan, sample, scan, tokenise
from gptray.files import storing


@dataclass(frozen=True)
class ScanText:
    """Count what is in a unit. alphabet: keep its characters too."""

    alphabet: bool

    def __call__(self, number: int, unit: Sequence[Piece]) -> UnitScan:
        return scan(unit, alphabet=self.alphabet)


@dataclass(frozen=True)
class SampleText:
    """Draw training text from a unit. share: of its text, 0 to 1."""

    share: float
    seed: int

    def __call__(self, number: int, unit: Sequence[PiecePlan]) -> list[str]:
        return sample(unit, share=self.share, seed=self.seed, number=number)


@dataclass(frozen=True)
class WriteShards:
    """Write the shards of a unit into `folder`, which becomes `data_dir`; by label of the split."""

    folder: Path
    data_dir: Path

    def __call__(self, number: int, unit: Sequence[PiecePlan]) -> dict[int, Shard]:
        with storing(self.data_dir):
            return tokenise(unit, folder=self.folder, number=number)
