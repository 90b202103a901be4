"""Scans a corpus once on Ray Data: counts its content, plans the split and collects warnings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from gptray.data.builtin import builtin_documents
from gptray.data.data_manifest import SplitEntry
from gptray.data.pieces import Reading, plan_pieces
from gptray.data.request import Request
from gptray.data.shares import marker_warning, repeat_warnings, separator_warning, share_warnings
from gptray.data.sources import BUILTIN, Source, SourceFile
from gptray.data.split_plan import ScannedText, SplitPlan, plan_split
from gptray.data.tokenizer import Tokenizer
from gptray.data.work import UnitScan, scan
from gptray.jobs.cluster.tasks import map_items
from gptray.storage.files import storing
from gptray.storage.template_file import TEMPLATE

log = logging.getLogger("gptray")
_NAMED_FILES = 5  # how many files messages name


def find_pieces(
    request: Request, tokenizer: Tokenizer | None, folder: Path, *, piece_bytes: int
) -> list[tuple[Source, ScannedText]]:
    """The files of every source, cut into units of work; scans nothing yet.

    folder: also holds the tokenizer with its chat template, if there is one.
    """
    reading, saved = request.reading, folder / "tokenizer"
    if (saved / TEMPLATE).is_file():
        reading = replace(reading, tokenizer=str(saved), eos_token=None)  # every node sees it
    cut_text = tokenizer is None or tokenizer.cuts_at_boundaries()
    texts = []
    for source, shares in request.sources:
        how = reading if source.files else Reading()
        if not source.files:
            source = replace(source, files=(_write_builtin(folder / f"{BUILTIN}.jsonl"),))
        units = plan_pieces(source.files, how, piece_bytes=piece_bytes, cut_text=cut_text)
        texts.append((source, ScannedText(units, [], shares, source.key)))
    return texts


def scan_and_plan(
    request: Request, texts: Sequence[tuple[Source, ScannedText]]
) -> tuple[SplitPlan, list[UnitScan]]:
    """Read everything once, and plan which split each document goes to."""
    units = [unit for _, text in texts for unit in text.units]
    alphabet = request.tokenizer == "char"
    scans = map_items(
        units,
        lambda number, unit: scan(unit, alphabet=alphabet),
        doing="reading",
        here=request.is_of_node,
    )
    found = iter(unit.pieces for unit in scans)
    scanned = [replace(text, scans=[next(found) for _ in text.units]) for _, text in texts]
    encodings = {name: one for unit in scans for name, one in unit.encodings.items()}
    for name, encoding in list(encodings.items())[:_NAMED_FILES]:
        log.info("%s is read as %s, because of its byte order mark", name, encoding)
    return plan_split(scanned, fraction=request.fraction, seed=request.seed), scans


def text_warnings(
    request: Request, plan: SplitPlan, scans: Sequence[UnitScan], splits: Mapping[str, SplitEntry]
) -> list[str]:
    """Warnings about the text and its split, which are logged and kept for reports."""
    (source, shares), *_ = request.sources
    names = request.split_names
    others = [entry["bytes"] for label, entry in enumerate(splits.values()) if label not in shares]
    bytes_of = {names[label]: splits[names[label]]["bytes"] for label in shares}
    # Training text that data.fraction leaves out counts as the training split's.
    rest = sum(size for name, size in bytes_of.items() if name != names[0])
    bytes_of[names[0]] = plan.total_bytes - sum(others) - rest
    files = [file for one, _ in request.sources for file in one.files]
    splits_text = any(file.format == "txt" for file in files) and not request.reading.separator
    pieces, plans = [piece for unit in scans for piece in unit.pieces], [*chain(*plan.units)]
    marked = marker_warning(pieces, splits_text=splits_text)
    unsplit = separator_warning(request.reading.separator, plans)
    found = [warning for warning in (marked, unsplit) if warning]
    found += share_warnings({names[label]: share for label, share in shares.items()}, bytes_of)
    found += repeat_warnings(plans, pieces)
    for warning in found:
        log.warning("%s", warning)
    return [*request.warnings, *found]


def _write_builtin(path: Path) -> SourceFile:
    """Write the builtin documents to a file that every task can read like any other source."""
    lines = (json.dumps({"text": text}) + "\n" for text in builtin_documents())
    with storing(path):
        path.write_text("".join(lines), "utf-8")
    status = path.stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns)
