"""The prepare job: scans and splits a corpus, trains the tokenizer, writes token shards.

Units of work go through Ray Data two or three times; only counts, and the tokenizer's sample,
come back. The result does not depend on the number of tasks. `gptray.data` reads, splits and
writes. For an object store, everything runs on the driver's node, in its cache.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gptray.commands import retyped
from gptray.config import Config, RunFailed, UserError
from gptray.data.data_manifest import (
    DataManifest,
    ShardEntry,
    SplitEntry,
)
from gptray.data.fallback import fallback_warning, token_measures, token_words
from gptray.data.publish import building
from gptray.data.request import Request, make_request
from gptray.data.shards import Shard, shard_dtype, split_entry
from gptray.data.shares import split_rows
from gptray.data.sources import BUILTIN
from gptray.data.split_plan import PiecePlan, SplitPlan
from gptray.data.tokenizer import Tokenizer, char_tokenizer, train_bpe
from gptray.data.tokenizer_files import KINDS, tokenizer_template
from gptray.data.tokens import MANIFEST, TokenData
from gptray.data.work import UnitScan, sample, tokenise
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.shared_storage import check_shared
from gptray.jobs.cluster.tasks import map_items
from gptray.jobs.folders.remote_data import download_data, publish_data
from gptray.jobs.next_steps import differing, settings_of, tell
from gptray.jobs.prepare.check import CheckedText, opened, size_of
from gptray.jobs.prepare.origins import provenance_of, template_entry, tokenizer_entry
from gptray.jobs.prepare.other_texts import ALSO_KEY, OtherTexts
from gptray.jobs.prepare.scanning import find_pieces, scan_and_plan, text_warnings
from gptray.jobs.progress.doing import doing
from gptray.storage.files import storing
from gptray.storage.record import last_event, read_events
from gptray.storage.template_file import TEMPLATE

log = logging.getLogger("gptray")

PIECE_BYTES = 16 << 20  # of text per task
SAMPLE_BYTES = 32 << 20  # of training text that a tokenizer is trained on


def run(checked: CheckedText) -> dict[str, object]:
    """Prepare a text; return the JSON line.

    `seconds` and `mb_per_sec` (null if nothing had to be built) count from the end of the check.
    """
    began = time.monotonic()
    is_ready = checked.data is not None
    data = stored_text(checked.config, checked.request, wait_s=checked.config.compute.wait_s)
    seconds = time.monotonic() - began
    splits = data.manifest["splits"]
    again = retyped("train")
    if again:
        tell([again], settings=settings_of(differing(checked.config)))
    return {
        "data_dir": str(data.data_dir),
        "documents": data.manifest["documents"],
        "chats": data.manifest.get("chats", 0),
        "tokens": {name: entry["tokens"] for name, entry in splits.items()},
        "bytes": {name: entry["bytes"] for name, entry in splits.items()},
        "split_documents": {name: entry["documents"] for name, entry in splits.items()},
        "vocab_size": data.vocab_size,
        "lost": {name: round(split.lost, 6) for name, split in data.splits.items()},
        **{key: round(value, 4) for key, value in token_measures(data.manifest).items()},
        "empty_rows": data.manifest["empty_rows"],
        "warnings": data.manifest["warnings"],
        "built": not is_ready,
        "seconds": round(seconds, 2),
        "mb_per_sec": None if is_ready else round(data.manifest["bytes"] / 1e6 / seconds, 3),
    }


def stored_text(config: Config, request: Request, *, wait_s: float | None = None) -> TokenData:
    """Like `prepare_text`; if storage_path is an object store, first download, then publish."""
    download_data(config, request.data_dir)
    data = prepare_text(request, wait_s=wait_s)
    publish_data(config, request.data_dir)
    return data


def prepared_also(
    texts: OtherTexts, config: Config, data: TokenData, *, resumed: Path | None = None
) -> dict[str, Path]:
    """Prepare the texts with the tokenizer of `data`; return their folders by name. Needs Ray.

    resumed: a run that may have scored them. Raises UserError if a text has changed since or is too
    short, and like `stored_text`.
    """
    start = last_event(read_events(resumed), "start") if resumed else None
    scored = start.get("also_data", {}) if start else {}  # fingerprints by name
    folders = {}
    for name, text in texts.items():
        own = str(data.data_dir / "tokenizer")
        also = stored_text(config, replace(text.request, tokenizer=own, eos_token=None))
        if len(also.splits["test"]) < 2:
            raise UserError(f"{ALSO_KEY}: {name} has fewer than 2 tokens; give more text")
        if resumed and scored.get(name) not in (None, also.fingerprint):
            raise UserError(
                f"{ALSO_KEY}: the text {name} has changed since the run {resumed.name} started; "
                "choose another name for the run"
            )
        folders[name] = also.data_dir
    return folders


def prepare(config: Config, *, piece_bytes: int = PIECE_BYTES) -> TokenData:
    """The prepared data of a config, see `prepare_text`."""
    return prepare_text(make_request(config), piece_bytes=piece_bytes)


def prepare_text(
    request: Request, *, piece_bytes: int = PIECE_BYTES, wait_s: float | None = None
) -> TokenData:
    """The prepared data of a text; built on Ray if there is none.

    piece_bytes: about how much text a task reads; it decides where shards end, never their content.
    wait_s: how long to wait for resources if Ray is not running yet, see `ray_cluster`.
    Existing data is verified byte by byte. Raises UserError for a source or tokenizer that cannot
    be read, naming file and line.
    """
    with doing(f"verifying {request.data_dir}"):
        data = opened(request.data_dir, verify=True)
    if data is None:
        tokenizer = None
        if request.tokenizer not in KINDS:
            tokenizer = Tokenizer.load(request.tokenizer, eos_token=request.eos_token)
        with building(request.data_dir) as folder, ray_cluster(wait_s=wait_s):
            if not request.is_of_node:
                words = f"storage_path={request.root.parent}"
                check_shared(written={words: request.root}, read=request.local_files)
            _build(request, tokenizer, folder, piece_bytes=piece_bytes)
        data = TokenData.open(request.data_dir)
    if data.loses:
        log.warning("%s; losses and bits per byte count 8 bits for each lost byte", data.loses)
    return data


def _build(
    request: Request, tokenizer: Tokenizer | None, folder: Path, *, piece_bytes: int
) -> None:
    """Fill `folder` with the tokenizer, the shards and, last, the manifest."""
    began = time.monotonic()
    if tokenizer is not None:
        _save_tokenizer(request, tokenizer, folder)
    texts = find_pieces(request, tokenizer, folder, piece_bytes=piece_bytes)
    files = [file for source, _ in texts for file in source.files]
    log.info("preparing %s: %s", request.data_dir.name, size_of(files))
    split_plan, scans = scan_and_plan(request, texts)
    if tokenizer is None:
        tokenizer = _make_tokenizer(request, split_plan, scans)
        _save_tokenizer(request, tokenizer, folder)
    data_dir = request.data_dir

    def write_shards(number: int, unit: Sequence[PiecePlan]) -> dict[int, Shard]:
        with storing(data_dir):
            return tokenise(unit, folder=folder, number=number)

    here = request.is_of_node
    shards = map_items(split_plan.units, write_shards, doing="tokenizing", here=here)
    for file in files:
        if file.changed():
            raise RunFailed(f"{file.name} changed while it was being prepared; start again")
    splits = _number_shards(folder, request.split_names, split_plan, shards)
    provenance = provenance_of(request, [source for source, _ in texts], split_plan, scans)
    manifest: DataManifest = {
        **provenance,
        "tokenizer": {
            **tokenizer_entry(request, tokenizer, shards),
            **template_entry(folder / "tokenizer", has_chats="chats" in provenance),
        },
        "dtype": shard_dtype(tokenizer.vocab_size),
        "splits": splits,
        "warnings": text_warnings(request, split_plan, scans, splits),
    }
    asked = request.vocab_size if request.tokenizer == "bpe" else None
    if warning := fallback_warning(manifest, asked=asked):
        log.warning("%s", warning)
        manifest["warnings"].append(warning)
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    with storing(request.data_dir):
        (folder / f"{BUILTIN}.jsonl").unlink(missing_ok=True)
        (folder / MANIFEST).write_text(text + "\n", "utf-8")
    log.info("prepared %s in %.1f s", request.data_dir, time.monotonic() - began)
    for name, words in split_rows(manifest):
        log.info("%-5s  %s", name, words)
    log.info("tokens  %s", token_words(manifest))


def _save_tokenizer(request: Request, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer/`, with the chat template of the tokenizer that was asked for."""
    template = tokenizer_template(request.tokenizer)
    with storing(request.data_dir):
        tokenizer.save(folder / "tokenizer")
        if template is not None:
            (folder / "tokenizer" / TEMPLATE).write_text(template, "utf-8", newline="")


def _make_tokenizer(request: Request, plan: SplitPlan, scans: Sequence[UnitScan]) -> Tokenizer:
    if request.tokenizer == "char":
        # From the whole text: characters that occur only in validation text need a token too.
        return char_tokenizer(c for unit in scans for piece in unit.pieces for c in piece.alphabet)
    share, seed = SAMPLE_BYTES / max(plan.train_bytes, 1), request.seed
    texts = map_items(
        plan.units,
        lambda number, unit: sample(unit, share=share, seed=seed, number=number),
        doing="sampling",
        here=request.is_of_node,
    )
    with doing("training the tokenizer"):
        return train_bpe((text for unit in texts for text in unit), request.vocab_size)


def _number_shards(
    folder: Path, names: Sequence[str], plan: SplitPlan, units: Sequence[dict[int, Shard]]
) -> dict[str, SplitEntry]:
    """Rename the tasks' files to their final names, in corpus order, and list them by split."""
    splits: dict[str, SplitEntry] = {}
    for label, documents in enumerate(plan.documents):
        entries: list[ShardEntry] = []
        for shard in (unit[label] for unit in units if label in unit):
            name = f"{names[label]}-{len(entries):05d}.bin"
            (folder / shard.entry["file"]).rename(folder / name)
            entries.append({**shard.entry, "file": name})
        splits[names[label]] = split_entry(documents, entries)
    return splits
