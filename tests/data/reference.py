"""What prepared data should hold, worked out the slow and obvious way: whole texts, one process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gptray.data.split import UNUSED, Region, assign
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData, TokenSplit

Expected = dict[str, list[int]]
NAMES = ("train", "val", "test")


class Run(NamedTuple):
    """A document's text in a split; one that is cut has no end, or no beginning."""

    text: str
    ends: bool
    begins: bool


def expected_runs(
    texts: list[str], split: tuple[float, ...], *, seed: int, fraction: float = 1.0
) -> dict[str, list[Run]]:
    """What of each text is in each split, in corpus order."""
    sizes = np.array([len(text.encode()) for text in texts])
    characters = np.array([len(text) for text in texts])
    shares = dict(enumerate(split))
    assigned = assign(sizes, characters, shares, fraction=fraction, seed=seed)
    out: dict[str, list[Run]] = {name: [] for name in NAMES[: len(split)]}
    for number, text in enumerate(texts):
        whole = (Region(len(text), int(assigned.labels[number])),)
        start = 0
        for stop, label in assigned.cut.get(number, whole):
            if label != UNUSED:
                out[NAMES[label]].append(Run(text[start:stop], stop == len(text), start == 0))
            start = stop
    return out


def expected_tokens(runs: dict[str, list[Run]], tokenizer: Tokenizer) -> Expected:
    """Every run's tokens, and what marks where its document begins and ends."""
    prefix, end = tokenizer.document_prefix, [tokenizer.eos_id]
    return {
        name: [
            token
            for text, ends, begins in found
            for token in [
                *(prefix if begins else []),
                *tokenizer.encode(text),
                *(end if ends else []),
            ]
        ]
        for name, found in runs.items()
    }


def splits_of(data: TokenData) -> dict[str, TokenSplit]:
    found = {"train": data.train, "val": data.val, "test": data.test}
    return {name: split for name, split in found.items() if split is not None}


def tokens_of(data: TokenData) -> Expected:
    """Every token of every split."""
    return {name: split.slice(0, len(split)).tolist() for name, split in splits_of(data).items()}


def texts_of(data: TokenData) -> dict[str, str]:
    """All text of each split, decoded, with its ends of text as tokens' names."""
    return {name: data.tokenizer.decode(ids) for name, ids in tokens_of(data).items()}
