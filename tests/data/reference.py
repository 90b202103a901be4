"""What prepared data should hold, worked out the slow and obvious way: whole texts, one process."""

from __future__ import annotations

import numpy as np

from gptray.data.split import UNUSED, assign_documents
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import TokenData, TokenSplit

Expected = dict[str, list[int]]
NAMES = ("train", "val", "test")


def expected_documents(
    texts: list[str], split: tuple[float, ...], *, seed: int, fraction: float = 1.0
) -> dict[str, list[str]]:
    """Texts of each split, in corpus order."""
    sizes = np.array([len(text.encode()) for text in texts])
    labels = assign_documents(sizes, split, fraction=fraction, seed=seed)
    out: dict[str, list[str]] = {name: [] for name in NAMES[: len(split)]}
    for text, label in zip(texts, labels.tolist(), strict=True):
        if label != UNUSED:
            out[NAMES[label]].append(text)
    return out


def expected_tokens(documents: dict[str, list[str]], tokenizer: Tokenizer) -> Expected:
    """Every document's tokens and an end of text behind each."""
    return {
        name: [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
        for name, texts in documents.items()
    }


def splits_of(data: TokenData) -> dict[str, TokenSplit]:
    found = {"train": data.train, "val": data.val, "test": data.test}
    return {name: split for name, split in found.items() if split is not None}


def tokens_of(data: TokenData) -> Expected:
    """Every token of every split."""
    return {name: split.slice(0, len(split)).tolist() for name, split in splits_of(data).items()}


def documents_of(data: TokenData) -> dict[str, list[str]]:
    """Every document's text, decoded between its ends of text."""
    out: dict[str, list[str]] = {}
    for name, ids in tokens_of(data).items():
        documents: list[list[int]] = [[]]
        for token in ids:
            if token == data.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        assert documents.pop() == []
        out[name] = [data.tokenizer.decode(document) for document in documents]
    return out
