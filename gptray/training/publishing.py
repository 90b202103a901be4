"""Publishes a run's best model as its `model/`, merging an adapter into its base."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptray.data.openings import openings
from gptray.data.tokens import TokenData
from gptray.model.adapter import ADAPTER, Base
from gptray.model.adapter_files import save_merged
from gptray.model.adapter_folder import open_adapter
from gptray.model.example import save_example
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.storage.files import remove, storing
from gptray.training.checkpoint import AVERAGED, MODEL, publish_folder


def save_model(model: GPT, folder: Path, data: TokenData) -> None:
    """Write a model with its tokenizer and an example prompt."""
    save_pretrained(model, folder, eos_token_id=data.end_ids, bos_token_id=_bos_id(data))
    _save_text_files(folder, data)


def publish_best(
    checkpoint: Path, run_dir: Path, data: TokenData, base: Base | None, *, averaged: bool = False
) -> None:
    """Make the checkpoint's model the run's `model/`, and its adapter of `base` `adapter/`.

    averaged: publish the averaged weights. Raises RunFailed like `publish_folder`.
    """
    if base is None:
        publish_folder(checkpoint / (AVERAGED if averaged else MODEL), run_dir / MODEL)
        return
    draft = run_dir / ".merged.tmp"
    with storing(run_dir / MODEL):
        remove(draft)
        try:
            adapter = open_adapter(checkpoint / ADAPTER, base)
            save_merged(
                base,
                adapter,
                draft,
                vocab_size=data.vocab_size,
                eos_token_id=data.end_ids,
                bos_token_id=_bos_id(data),
            )
            _save_text_files(draft, data)
            publish_folder(adapter.folder, run_dir / ADAPTER)
            publish_folder(draft, run_dir / MODEL)
        finally:
            remove(draft)


def _bos_id(data: TokenData) -> int | None:
    return next(iter(data.tokenizer.prefix), None)


def _save_text_files(folder: Path, data: TokenData) -> None:
    shutil.copytree(data.data_dir / "tokenizer", folder, dirs_exist_ok=True)
    for prompt, parse_special in openings(data)[:1]:
        save_example(folder, prompt, parse_special=parse_special)
