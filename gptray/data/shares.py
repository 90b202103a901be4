"""Describes prepared text: the shares of its splits, and warnings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gptray.data.data_manifest import DataManifest
from gptray.data.sources import SourceFile
from gptray.data.split import LONG_NAMES, SPLITS, TEST, TRAIN, UNUSED, VAL, Labels
from gptray.data.split_plan import PiecePlan, PieceScan
from gptray.wording import count, size_words

# Warn about a share that is off by more than this fraction of what was asked for.
_TOLERANCE = 0.2
# Warn if more than this share of a held-out text is in the training text too.
_REPEATED = 0.05


def split_rows(manifest: DataManifest) -> list[tuple[str, str]]:
    """Each split's name and size, in words."""
    rows = []
    for name, split in manifest["splits"].items():
        documents, tokens = count(split["documents"], "document"), count(split["tokens"], "token")
        size, share = size_words(split["bytes"]), split["bytes"] / max(manifest["bytes"], 1)
        rows.append((name, f"{documents}, {size} ({share:.1%}), {tokens}"))
    return rows


def share_warnings(asked: Mapping[str, float], bytes_of: Mapping[str, int]) -> list[str]:
    """Warnings for the splits of a source that are far from the share asked for."""
    total = max(sum(bytes_of.values()), 1)
    return [
        f"the {LONG_NAMES[name]} split has {100 * bytes_of[name] / total:.3g}% of the text, but "
        f"data.split asks for {100 * share:.3g}%"
        for name, share in asked.items()
        if abs(bytes_of[name] / total - share) > _TOLERANCE * share
    ]


def repeat_warnings(plans: Sequence[PiecePlan], scans: Sequence[PieceScan]) -> list[str]:
    """Warnings about validation and test text made up of documents that the model trains on."""
    labels = np.concatenate([_last_labels(plan) for plan in plans])
    digests = np.concatenate([scan.digests for scan in scans])
    sizes = np.concatenate([scan.bytes for scan in scans])
    trained = np.isin(digests, digests[np.isin(labels, (TRAIN, UNUSED))])
    warnings = []
    for label in (VAL, TEST):
        held = labels == label
        share = int(sizes[held & trained].sum()) / max(int(sizes[held].sum()), 1)
        if share > _REPEATED:
            name = LONG_NAMES[SPLITS[label]]
            warnings.append(
                f"{share:.0%} of the {name} text repeats documents of the training text word for "
                f"word, so {name} loss is lower than on new text; remove the repetitions"
            )
    return warnings


def _last_labels(plan: PiecePlan) -> Labels:
    """Each document's label; a cut one has its last region's."""
    labels = plan.labels.copy()
    for document, regions in plan.cut.items():
        labels[document] = regions[-1].label
    return labels


def separator_warning(separator: str | None, plans: Iterable[PiecePlan]) -> str | None:
    """A warning if the separator splits no text file."""
    documents: Counter[SourceFile] = Counter()
    for plan in plans:
        if plan.piece.file.format == "txt":
            documents[plan.piece.file] += len(plan.labels)
    if separator is None or not documents or max(documents.values()) > 1:
        return None
    told = f"data.separator={separator!r} does not split any text file"
    if re.search(r"\\[nrt]", separator):
        return f"{told}: it has a backslash, not a line break; in a shell write $'{separator}'"
    return f"{told}: it never occurs between two texts"


def marker_warning(scans: Iterable[PieceScan], *, splits_text: bool) -> str | None:
    """A warning if the text contains well-known markers, the commonest first.

    splits_text: whether there are text files that data.separator would split there.
    """
    counts: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for scan in scans:
        for marker, (times, within) in scan.markers.items():
            counts[marker] += times
            documents[marker] += within
    if not counts:
        return None
    found = ", ".join(
        f"{marker} {count(times, 'time')} in {count(documents[marker], 'document')}"
        for marker, times in counts.most_common()
    )
    likeliest = counts.most_common(1)[0][0]
    cure = f"; data.separator='{likeliest}' splits .txt files at it" if splits_text else ""
    return (
        "the text contains markers as plain text, which the model will learn to write: "
        f"{found}{cure}"
    )
