"""What an evaluate job is about: which model, on which text, in which windows, saved where.

Found and checked without torch and without Ray, as far as that can be known.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptray.config import Config, RunFailed, UserError, flatten, load_config, override
from gptray.config.names import label_of
from gptray.data.request import Request, make_request, tokenizer_name, whole_request
from gptray.data.scoring import Windows
from gptray.data.split import LONG_NAMES
from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import KINDS
from gptray.data.tokens import TokenData
from gptray.evaluation.bleu import check_bleu
from gptray.evaluation.result import EVALUATION
from gptray.files import absolute
from gptray.jobs.cluster import check_resources
from gptray.jobs.models import (
    find_model,
    has_model,
    newest_run,
    storage_of,
    weights_sha256,
    with_tokenizer,
)
from gptray.jobs.places import with_whole_paths
from gptray.jobs.prepare.run import check_sources, prepare, prepared
from gptray.jobs.run_folder import resolve, run_dir
from gptray.jobs.storage import check_storage
from gptray.model.shape import read_shape
from gptray.training.checkpoint import TrainerState, checkpoint_step, newest_whole
from gptray.tuning.record import crowned_dir


@dataclass(frozen=True)
class Subject:
    """A job that has been looked at: its model exists, and so do the files of its text.

    run: the run whose best model or checkpoint this is; None for any other folder.
    text: the config that says what text, tokenizer and split there are.
    is_own_text: whether the run was trained on that very text.
    """

    config: Config
    model_dir: Path
    run: Path | None
    text: Config
    is_own_text: bool
    block_size: int
    stride: int
    folder: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""
        return Tokenizer.load(self.model_dir)

    @cached_property
    def model_sha256(self) -> str:
        return weights_sha256(self.model_dir)

    @cached_property
    def trained_on(self) -> str | None:
        """The data that the run's newest whole checkpoint says it has seen; None without one."""
        assert self.run
        try:
            checkpoint, _ = newest_whole(self.run)
        except RunFailed:
            return None  # there is none to ask
        return TrainerState.load(checkpoint).data if checkpoint else None

    def request(self, config: Config) -> Request:
        """The text to prepare: the splits, or all of `evaluate.source`."""
        source = self.config.evaluate.source
        if source is None:
            return make_request(config)
        return whole_request(config, source, key="evaluate.source")

    @property
    def source(self) -> list[str]:
        """What says where the text is."""
        source = self.config.evaluate.source or self.text.data.source
        return [source] if isinstance(source, str) else list(source)

    def prepared(self) -> TokenData | None:
        """The text's tokens, where they are there already."""
        return prepared(self.text, self.request)

    def prepare(self) -> TokenData:
        """The text's tokens; needs Ray where they are not there already."""
        return prepare(self.text, self.request)

    def windows(self, data: TokenData) -> dict[str, tuple[Windows, list[int]]]:
        """The windows of each split that there is, and which of them to score."""
        found = {}
        for name, split in data.splits.items():
            windows = Windows(len(split), self.block_size, self.stride)
            most = self.config.evaluate.train_tokens if name == "train" else windows.tokens
            found[name] = windows, windows.sample(most)
        return found


def look(config: Config) -> Subject:
    """Find the model and the text. Raises UserError naming the key or the file."""
    check_resources(config.compute)
    check_bleu(config.evaluate.bleu_tokenize)
    config = with_whole_paths(with_tokenizer(config))
    if "://" in config.storage_path:
        raise UserError(
            f"storage_path={config.storage_path}: must be a folder; on a cluster one that every "
            "node sees"
        )
    model_dir = _trained(find_model(config, _source(config), key="evaluate.model")[0].resolve())
    run = _run_of(model_dir)
    trained = with_whole_paths(load_config(str(run / "config.yaml"), [])) if run else None
    block_size, stride = _window(config, trained, model_dir)
    text = _text(config, trained, run, model_dir)
    subject = Subject(
        config=config,
        model_dir=model_dir,
        run=run,
        text=text,
        is_own_text=trained is not None and _is_own_text(config, text, trained),
        block_size=block_size,
        stride=stride,
        folder=run if run and run / "model" == model_dir else _folder(config, model_dir, run),
    )
    check_sources(text, subject.request)
    check_storage(text.model_copy(update={"evaluate": config.evaluate}))
    _check_tokenizer(subject)
    found = subject.prepared()
    if found:
        check_text(subject, found)
    return subject


def _source(config: Config) -> str | None:
    """What `evaluate.model` says; by default the run called name (None) or of this config."""
    if config.evaluate.model is not None or config.name is not None:
        return config.evaluate.model
    run = run_dir(resolve(config))
    if not has_model(run):
        newest = newest_run(storage_of(config))
        other = f", such as name={newest.name}" if newest else ""
        raise UserError(
            f"evaluate.model is not set and {run} has no trained model: train it first, or "
            f"name a run, a model folder or a hub id{other}"
        )
    return str(run)


def _trained(model_dir: Path) -> Path:
    """The model in the run that trained it: a sweep's is the copy of its winner's."""
    winner = crowned_dir(model_dir.parent)
    return winner / "model" if winner and model_dir.name == "model" else model_dir


def _run_of(model_dir: Path) -> Path | None:
    """The run that a model folder belongs to: its best model's, or a checkpoint's."""
    home = model_dir.parent
    run = home.parent if checkpoint_step(home) is not None else home
    return run if model_dir.name == "model" and (run / "config.yaml").is_file() else None


def _window(config: Config, trained: Config | None, model_dir: Path) -> tuple[int, int]:
    """Tokens of a window and between two: as set, else the run's, else all that the model takes."""
    n_positions: int = read_shape(model_dir)["n_positions"]
    block_size = n_positions
    if "block_size" in config.train.model_fields_set:
        block_size = config.train.block_size
    elif trained:
        block_size = trained.train.block_size
    if block_size > n_positions:
        raise UserError(
            f"train.block_size={block_size} is more than the {n_positions} positions of the model "
            f"{model_dir}"
        )
    stride = config.evaluate.stride or block_size
    if stride > block_size:
        raise UserError(
            f"evaluate.stride={stride} must not be above train.block_size={block_size}: tokens "
            "between two windows would be left out"
        )
    return block_size, stride


def _text(config: Config, trained: Config | None, run: Path | None, model_dir: Path) -> Config:
    """The config of the text: the run's, changed by what is given, with a tokenizer that fits.

    Any text but the run's own is read with the model's own tokenizer, unless one is given.
    """
    given = _data_keys(flatten(config, given=True))
    text = config
    if trained and run:
        if given.get("data.source", trained.data.source) != trained.data.source:
            # Held-out text belongs to the source beside which it was named.
            given = {"data.val_source": None, "data.test_source": None, **given}
        text = override(trained, {**given, "storage_path": str(run.parent), "name": run.name})
        if _is_own_text(config, text, trained):
            return text
    if given.get("data.tokenizer") is None:
        text = override(text, {"data.tokenizer": str(model_dir)})
    return text


def _is_own_text(config: Config, text: Config, trained: Config) -> bool:
    same = _data_keys(flatten(text)) == _data_keys(flatten(trained))
    return same and config.evaluate.source is None


def _data_keys(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: flat[key] for key in flat if key.startswith("data.") or key == "seed"}


def _folder(config: Config, model_dir: Path, run: Path | None) -> Path:
    """Where to keep the results of a model that is no run's best one: a folder of its own."""
    storage = absolute(config.storage_path, key="storage_path")
    folder = storage / (config.name or _name(config, model_dir, run))
    visible = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    if visible and ((folder / "config.yaml").exists() or not (folder / EVALUATION).exists()):
        raise UserError(
            f"{folder} exists and is not an evaluation of {model_dir}; choose another name"
        )
    return folder


def _name(config: Config, model_dir: Path, run: Path | None) -> str:
    """A name that this model always gets."""
    source = Path(config.evaluate.model or model_dir)
    label = source.parent.name if source.name == "model" else source.name
    label = f"{run.name}-{label}" if run else label
    label = label_of(label, 40) or "model"
    return f"{label}-{weights_sha256(model_dir)[:6]}"


def check_text(subject: Subject, data: TokenData) -> None:
    """Refuse tokens that are too few, or not this model's.

    Raises UserError naming both hashes where model and text do not belong together.
    """
    for name, split in data.splits.items():
        what = f"the {LONG_NAMES[name]} split of {', '.join(subject.source)}"
        cure = "change data.split or give more text"
        if subject.config.evaluate.source is not None:
            what, cure = f"evaluate.source={', '.join(subject.source)}", "give more text"
        if len(split) < 2:
            raise UserError(f"{what} is empty ({len(split)} tokens); {cure}")
        if len(split) < subject.block_size:
            raise UserError(
                f"{what} has {len(split)} tokens, fewer than one block of {subject.block_size}; "
                f"{cure}, or set a lower train.block_size"
            )
    _check_same_tokenizer(subject, data.manifest["tokenizer"]["sha256"])
    if subject.is_own_text and subject.trained_on not in (None, data.fingerprint):
        raise UserError(
            f"the text of the run {subject.run} has changed since it was trained: its tokens had "
            f"sha256 {subject.trained_on}, now {data.fingerprint}; evaluate.source=... scores any "
            "text as a whole"
        )


def _check_tokenizer(subject: Subject) -> None:
    """Refuse a tokenizer that is not the model's, as far as that is known before the text is read.

    More rows than tokens are no mistake: many models pad their vocabulary.
    """
    folder, own = subject.model_dir, subject.tokenizer
    rows = read_shape(folder)["vocab_size"]
    if rows < own.vocab_size:
        raise UserError(
            f"{folder}: model and tokenizer do not belong together: the weights (sha256 "
            f"{subject.model_sha256}) know {rows} tokens, the tokenizer (sha256 {own.sha256}) "
            f"has {own.vocab_size}"
        )
    named = tokenizer_name(subject.text)
    if named not in KINDS:
        tokenizer = Tokenizer.load(named, eos_token=subject.text.data.eos_token)
        _check_same_tokenizer(subject, tokenizer.sha256)


def _check_same_tokenizer(subject: Subject, sha256: str) -> None:
    folder, own = subject.model_dir, subject.tokenizer.sha256
    if own != sha256:
        raise UserError(
            f"model and text do not belong together: the tokenizer of {folder} has sha256 "
            f"{own}, the one that reads the text has sha256 {sha256}; "
            f"{shlex.quote(f'data.tokenizer={folder}')} reads it with the model's own"
        )
