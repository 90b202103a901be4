"""The manifest's entries on where tokens come from: sources, split, tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from gptray.data.chat_template import ChatTemplate
from gptray.data.data_manifest import Provenance, SourceEntry, TemplateEntry, TokenizerEntry
from gptray.data.difference import Lost
from gptray.data.request import Request
from gptray.data.shards import Shard
from gptray.data.sources import BUILTIN, Source
from gptray.data.split_plan import SplitPlan
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokens import FORMAT_VERSION
from gptray.data.work import UnitScan
from gptray.storage.files import sha256_of
from gptray.storage.template_file import TEMPLATE


def provenance_of(
    request: Request, sources: Sequence[Source], plan: SplitPlan, scans: Sequence[UnitScan]
) -> Provenance:
    """The manifest's record of where the tokens come from: sources, split and counts."""
    sha256 = {name: digest for unit in scans for name, digest in unit.sha256.items()}
    named = {file for source, _ in request.sources for file in source.files}
    files: dict[str, list[SourceEntry]] = {
        source.key.removeprefix("data."): [
            {
                "path": file.name if file in named else BUILTIN,
                "size": file.size,
                "sha256": sha256[file.name],
            }
            for file in source.files
        ]
        for source in sources
    }
    chats = sum(piece.chats for unit in scans for piece in unit.pieces)
    return {
        "format": FORMAT_VERSION,
        "request": request.identity,
        "sources": files.pop(sources[0].key.removeprefix("data.")),
        # val_source and test_source, if given, and how many documents are chats.
        **cast(Provenance, {**files, **({"chats": chats} if chats else {})}),
        "split": {
            "fractions": list(request.split),
            "cut_documents": plan.cut_documents,
            "seed": request.seed,
        },
        "fraction": request.fraction,
        "documents": plan.total_documents,
        "bytes": plan.total_bytes,
        "empty_rows": sum(piece.empty_rows for unit in scans for piece in unit.pieces),
    }


def tokenizer_entry(
    request: Request, tokenizer: Tokenizer, units: Sequence[dict[int, Shard]]
) -> TokenizerEntry:
    """The manifest's entry for the tokenizer, with what it loses of the text."""
    lost = Lost.joined(shard.lost for unit in units for shard in unit.values())
    entry: TokenizerEntry = {
        "source": request.tokenizer,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_id,
        "lost": lost.entry(),
    }
    if tokenizer.document_prefix:
        entry["document_prefix"] = tokenizer.document_prefix
    return entry


def template_entry(tokenizer: Path, *, has_chats: bool) -> TemplateEntry:
    """The manifest's entry for the chat template in the folder, if there is one."""
    entry = TemplateEntry()
    if (tokenizer / TEMPLATE).is_file():
        entry["chat_template"] = sha256_of(tokenizer / TEMPLATE)
    template = ChatTemplate.of(str(tokenizer), eos_token=None) if has_chats else None
    if template and (end := template.end_of_turn()) is not None:
        entry["end_of_turn_id"] = end
    return entry
