"""Checks an evaluation before it starts: which model, on which text, in which windows.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gptray.config import Config, UserError, flatten, load_config, override
from gptray.data.request import Request, make_request, tokenizer_name, whole_request
from gptray.data.scoring import Windows
from gptray.data.split import LONG_NAMES
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS
from gptray.data.tokens import TokenData
from gptray.data.vocabulary import needed_rows
from gptray.evaluation.bleu import check_bleu
from gptray.jobs.adapters import adapter_sha256, check_adapter, with_adapter
from gptray.jobs.base import Plan
from gptray.jobs.cluster.machine import check_resources
from gptray.jobs.engine_plan import check_engine_backend
from gptray.jobs.evaluate.evaluated_model import (
    FoundModel,
    check_goes_with,
    models_to_evaluate,
    results_folder,
    sha256_of_models,
)
from gptray.jobs.folders.places import check_storage, with_absolute_paths
from gptray.jobs.folders.resuming import state_of
from gptray.jobs.models import CONFIG, for_workers, with_tokenizer
from gptray.jobs.prepare.check import CheckedText, check_text, column_row
from gptray.jobs.prepare.other_texts import OtherTexts, check_also
from gptray.model.shape import read_shape
from gptray.storage.remote_folder import RemoteFolder

# The longest default window; the full contexts of Llama or Qwen are too long to score in.
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class CheckedEvaluation:
    """An evaluation that can start: its model and the files of its text exist.

    others: models whose probabilities are averaged with the first one's, `found`.
    also: the texts of evaluate.also. is_own_text: whether the run was trained on this text.
    folder: where the results go. home: where they are published if storage is an object store.
    """

    config: Config
    found: FoundModel
    others: list[FoundModel]
    text: CheckedText
    also: OtherTexts
    is_own_text: bool
    block_size: int
    stride: int
    folder: Path
    home: RemoteFolder | None

    @property
    def models(self) -> list[str]:
        """Each model's name on every node: its folder, or the URI that it is fetched from."""
        return [for_workers(one.folder, one.place) for one in (self.found, *self.others)]

    @property
    def model(self) -> str:
        """The name of the model, or of all models, in results and messages."""
        return ", ".join(self.models)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""
        return Tokenizer.load(self.found.folder)

    @cached_property
    def model_sha256(self) -> str:
        """The sha256 of the weights of the adapter, if there is one, or of all models."""
        adapter = adapter_sha256(self.config.evaluate.adapter)
        return adapter or sha256_of_models([self.found, *self.others])

    @cached_property
    def trained_on(self) -> str | None:
        """The fingerprint of the run's data in its newest intact checkpoint; None without one."""
        assert self.found.run
        state = state_of(self.found.run)
        return state.data if state else None

    @property
    def source(self) -> list[str]:
        source = self.config.evaluate.source or self.text.config.data.source
        return [source] if isinstance(source, str) else list(source)

    def windows(self, data: TokenData) -> dict[str, tuple[Windows, list[int]]]:
        """The windows of each text, and the numbers of those to score."""
        found = {}
        for name, split in data.scored.items():
            windows = Windows(len(split), self.block_size, self.stride)
            most = self.config.evaluate.train_tokens if name == "train" else windows.tokens
            found[name] = windows, windows.sample(most)
        return found


def check(config: Config) -> CheckedEvaluation:
    """Find the model and the text. Raises UserError naming the key or the file."""
    check_resources(config.compute)
    check_bleu(config.evaluate.bleu_tokenize)
    config = with_adapter(with_absolute_paths(with_tokenizer(config)), "evaluate")
    found, *others = models_to_evaluate(config)
    model_dir, run = found.folder, found.run
    check_adapter(config.evaluate.adapter, model_dir, key="evaluate.adapter")
    for key in ("adapter", "quantized"):
        if others and getattr(config.evaluate, key):
            raise UserError(
                f"evaluate.{key} works with one model, but evaluate.model names several"
            )
    check_engine_backend(config)
    trained = with_absolute_paths(load_config(str(run / CONFIG), [])) if run else None
    block_size, stride = _window(config, trained, found)
    text = _text(config, trained, found)
    folder, home = results_folder(config, [found, *others])
    checked = CheckedEvaluation(
        config=config,
        found=found,
        others=others,
        text=check_text(text, partial(_request, config.evaluate.source)),
        also=check_also(config, text, trained_on=None),
        is_own_text=trained is not None and _is_own_text(config, text, trained),
        block_size=block_size,
        stride=stride,
        folder=folder,
        home=home,
    )
    check_storage(text.model_copy(update={"evaluate": config.evaluate}))
    _check_tokenizer(checked)
    for other in others:
        check_goes_with(found, other, block_size, own_text=text if checked.is_own_text else None)
    if checked.text.data:
        check_tokens(checked, checked.text.data)
    return checked


def plan(checked: CheckedEvaluation) -> Plan:
    config, data, kinds = checked.config, checked.text.data, checked.config.evaluate.quantized
    rows = [
        *(("model", model) for model in checked.models),
        *([("adapter", adapter)] if (adapter := config.evaluate.adapter) else []),
        ("text", ", ".join(checked.source)),
        *column_row(checked.text),
        ("windows", f"{checked.block_size} tokens, {checked.stride} apart"),
        ("weights", config.quantize.weights.replace("none", "full")),
        *([("compared", f"full weights, {', '.join(kinds)}")] if kinds else []),
    ]
    if not data:
        rows.append(("token data", "to be prepared first"))
    for name, (windows, numbers) in (checked.windows(data) if data else {}).items():
        tokens = sum(len(windows.counted(number)) for number in numbers)
        of = f" of {len(windows):,}" if len(numbers) < len(windows) else ""
        rows.append((name, f"{tokens:,} tokens in {len(numbers):,}{of} windows"))
    return [
        *rows,
        *([("scored too", ", ".join(checked.also))] if checked.also else []),
        ("passages", f"{0 if checked.others else config.evaluate.passages} to continue"),
        ("workers", f"{config.compute.max_workers} ({'GPU' if config.compute.use_gpu else 'CPU'})"),
        ("files", f"{checked.home or checked.folder}/: evaluation.json report.html and its PNGs"),
    ]


def _request(source: str | Sequence[str] | None, text: Config) -> Request:
    """The text to prepare: the splits, or all of `evaluate.source`."""
    if source is None:
        return make_request(text)
    return whole_request(text, source, key="evaluate.source")


def _window(config: Config, trained: Config | None, found: FoundModel) -> tuple[int, int]:
    """The window's length and stride in tokens.

    The length is train.block_size if set, else the run's, else the model's context, at most
    LONGEST_WINDOW.
    """
    n_positions = read_shape(found.folder).n_positions
    block_size = min(n_positions, LONGEST_WINDOW)
    if "block_size" in config.train.model_fields_set:
        block_size = config.train.block_size
    elif trained:
        block_size = trained.train.block_size
    if block_size > n_positions:
        raise UserError(
            f"train.block_size={block_size} is more than the {n_positions} positions of the model "
            f"{found.place}"
        )
    stride = config.evaluate.stride or block_size
    if stride > block_size:
        raise UserError(
            f"evaluate.stride={stride} must not be above train.block_size={block_size}: tokens "
            "between two windows would be left out"
        )
    return block_size, stride


def _text(config: Config, trained: Config | None, found: FoundModel) -> Config:
    """The config of the text: the run's with the given keys, and a matching tokenizer.

    Text other than the run's own is read with the model's tokenizer, unless one is given.
    """
    given = _data_keys(flatten(config, given=True))
    text = config
    if trained and found.run:
        storage = config.storage_path if found.home else str(found.run.parent)
        if given.get("data.source", trained.data.source) != trained.data.source:
            # The run's held-out texts belong to its own source.
            given = {"data.val_source": None, "data.test_source": None, **given}
        text = override(trained, {**given, "storage_path": storage, "name": found.run.name})
        if _is_own_text(config, text, trained):
            return text
    if given.get("data.tokenizer") is None:
        text = override(text, {"data.tokenizer": for_workers(found.folder, found.place)})
    return text


def _is_own_text(config: Config, text: Config, trained: Config) -> bool:
    same = _data_keys(flatten(text)) == _data_keys(flatten(trained))
    return same and config.evaluate.source is None


def _data_keys(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: flat[key] for key in flat if key.startswith("data.") or key == "seed"}


def check_tokens(checked: CheckedEvaluation, data: TokenData) -> None:
    """Raise UserError for too few tokens, or for another tokenizer's, naming both hashes."""
    for name, split in data.splits.items():
        what = f"the {LONG_NAMES[name]} split of {', '.join(checked.source)}"
        cure = "change data.split or give more text"
        if checked.config.evaluate.source is not None:
            what, cure = f"evaluate.source={', '.join(checked.source)}", "give more text"
        if len(split) < 2:
            raise UserError(f"{what} is empty ({len(split)} tokens); {cure}")
        if len(split) < checked.block_size:
            raise UserError(
                f"{what} has {len(split)} tokens, fewer than one block of {checked.block_size}; "
                f"{cure}, or lower train.block_size"
            )
    _check_same_tokenizer(checked, data.manifest["tokenizer"]["sha256"])
    if checked.is_own_text and checked.trained_on not in (None, data.fingerprint):
        raise UserError(
            f"the text of the run {checked.found.run} has changed since it was trained: its tokens "
            f"had sha256 {checked.trained_on}, now {data.fingerprint}; evaluate.source=... scores "
            "any text as a whole"
        )


def _check_tokenizer(checked: CheckedEvaluation) -> None:
    """Refuse a tokenizer that is not the model's, as far as it is known before reading the text.

    More rows than tokens are fine: many models pad their vocabulary.
    """
    folder, own = checked.found.folder, checked.tokenizer
    rows = read_shape(folder).rows
    if rows < needed_rows(own):
        raise UserError(
            f"{folder}: model and tokenizer do not belong together: the weights (sha256 "
            f"{checked.model_sha256}) have {rows} tokens, the tokenizer (sha256 {own.sha256}) "
            f"has {own.vocab_size}"
        )
    text = checked.text.config
    named = tokenizer_name(text)
    if named not in KINDS:
        tokenizer = Tokenizer.load(named, eos_token=text.data.eos_token)
        _check_same_tokenizer(checked, tokenizer.sha256)


def _check_same_tokenizer(checked: CheckedEvaluation, sha256: str) -> None:
    model, own = checked.models[0], checked.tokenizer.sha256
    if own != sha256:
        raise UserError(
            f"model and text do not belong together: the tokenizer of {model} has sha256 {own}, "
            f"the one that reads the text has sha256 {sha256}; set "
            f"{shlex.quote(f'data.tokenizer={model}')} to read it with the model's own"
        )
