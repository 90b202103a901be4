"""Where a job keeps what it makes: writable, and no part of its own text. No torch, no Ray."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from gptray.config import Config, UserError
from gptray.config.named_texts import named_texts
from gptray.files import absolute, check_writable
from gptray.node_cache import storage_folder


def check_storage(config: Config) -> None:
    """Refuse a storage_path that cannot be written, or whose files would become text.

    Raises:
        UserError: names storage_path, and the source that reads what is there.
    """
    storage = storage_folder(config.storage_path)
    folder = storage / config.name if config.name else storage
    for key, sources in (
        ("data.source", config.data.source),
        ("evaluate.source", config.evaluate.source or []),
        ("evaluate.also", list(named_texts(config.evaluate.also).values())),
    ):
        for source in [sources] if isinstance(sources, str) else sources:
            if "://" not in source and _reads(source, folder, key=key):
                raise UserError(
                    f"storage_path={config.storage_path}: {folder} lies in {key}={source}, so that "
                    "the job's own files would become text; give a folder outside of it"
                )
    check_writable(folder, key=f"storage_path={config.storage_path}")


def _reads(source: str, folder: Path, *, key: str) -> bool:
    """Whether a source takes in the files of a folder, which need not be there yet."""
    path = str(absolute(source, key=key))
    if not os.path.isdir(path):
        if "**" not in source or os.path.exists(path):
            return False
        path = _fixed_part(path)
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if inside != real and not inside.startswith(real.rstrip(os.sep) + os.sep):
        return False
    # Hidden folders are not read.
    return not any(part.startswith(".") for part in Path(inside).relative_to(real).parts)


def _fixed_part(pattern: str) -> str:
    """The folder of a glob in which everything it matches lies."""
    parts = Path(pattern).parts
    wild = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:wild]))
