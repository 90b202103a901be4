"""Trained models as jobs find them: in a run, a folder, on the hub. Neither torch nor Ray here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gptray.config import Config, UserError
from gptray.data.tokenizer_files import tokenizer_files
from gptray.files import sha256_of
from gptray.model.header import check_weights
from gptray.model.shape import model_folder, read_shape, weight_files


def open_model(source: str | Path, *, key: str) -> Path:
    """The folder with the model and its tokenizer that the config's `key` names.

    Raises UserError, which begins with the key, for what is no model that text can be given to.
    """
    try:
        folder = model_folder(source)
        check_weights(folder, read_shape(folder))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if not tokenizer_files(folder):
        raise UserError(f"{key}: {folder} holds no tokenizer (tokenizer.json)")
    return folder


def find_model(config: Config, source: str | None, *, key: str) -> tuple[Path, str]:
    """The folder of the model that the config's `key` means by `source`, and what to call it.

    None: the run `name` in `storage_path`, or without a name the newest run there.
    Raises UserError.
    """
    if source is None:
        storage = Path(config.storage_path).expanduser()
        newest = storage / config.name if config.name else newest_run(storage)
        if newest is None:
            raise UserError(
                f"{key} is not set and {storage} holds no run with a model; name a run folder, a "
                "model folder or a hub id"
            )
        source = str(newest)
    return open_model(source, key=key), source


def newest_run(storage: Path) -> Path | None:
    """The run in a storage path whose model is the newest."""
    models = storage.glob("*/model/config.json")
    newest = max(models, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parents[1]


def weights_sha256(model_dir: Path) -> str:
    """Of the model's weights; of several files, of their digests in order."""
    digests = []
    for path in weight_files(model_dir):
        if not path.is_file():
            raise UserError(f"{path} is missing")
        digests.append(sha256_of(path))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
