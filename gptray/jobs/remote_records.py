"""Records of runs in an object store, fetched for whoever only reads them: never their weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gptray.files import cache_folder, remove, storing
from gptray.remote_folder import RemoteFolder

# Of a run, an evaluation, a sweep or its trials.
_RECORD = re.compile(
    r"(trials/[^/]+/)?"
    r"(config\.yaml|(metrics|events|trials)\.jsonl|evaluation\.json|model/(config|gptray)\.json)"
)
# Files that are fetched at a time.
_AT_ONCE = 8


def fetch_records(home: RemoteFolder, names: Iterable[str], folder: Path) -> None:
    """Have a folder here with the records among a run's files, and nothing else.

    Raises UserError for a store that cannot be read; RunFailed without room.
    """
    with storing(folder):
        remove(folder)

    def fetch(name: str) -> None:
        with suppress(FileNotFoundError):  # it went away meanwhile
            home.download(name, folder / name)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, filter(_RECORD.fullmatch, names)))


def records_folder(home: RemoteFolder) -> Path:
    """Where on this node the records of a run are kept, and what is made of them."""
    digest = hashlib.sha256(home.uri.encode()).hexdigest()[:24]
    return cache_folder() / "records" / digest / home.name
