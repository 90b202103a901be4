"""Watches a folder of adapters: additions, changes and removals take effect while serving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.generation.loading import pack_adapter
from gptray.model.adapter import CONFIG, WEIGHTS, Base, adapted_name
from gptray.model.adapter_folder import adapter_folder
from gptray.model.gpu_faults import memory_told
from gptray.serving.endpoint import Served
from gptray.storage.files import expanded

# (size, modification time) of each of an adapter's files; None if a file is missing.
State = tuple[tuple[int, int] | None, ...]


class AdapterWatch:
    """Serves the adapters in a folder, each under its own folder's name."""

    def __init__(self, folder: str | Path, served: Served, base: Base) -> None:
        self._folder, self._served, self._base = expanded(folder), served, base
        self._before: dict[str, State] | None = None  # at the previous scan
        self._done: dict[str, State] = {}  # as last served or refused
        self._names: set[str] = set()  # of served adapters
        self._unread = ""  # why the folder could not be read

    def scan(self) -> list[str]:
        """Serve what the folder holds now. Returns a line for each change.

        Files that changed since the previous scan wait for the next one, since a copy may be in
        progress. An adapter that cannot be served is reported once.
        """
        try:
            found = dict(self._found())
        except OSError as error:
            before, self._unread = self._unread, f"serve.adapters={self._folder}: {error.strerror}"
            return [self._unread] if self._unread != before else []
        self._unread, told = "", []
        for name in sorted(self._names - found.keys()):
            self._served.drop(name)
            self._names.remove(name)
            told.append(f"{adapted_name(self._served.name, name)} is no longer served")
        last, self._before = self._before, found
        self._done = {name: state for name, state in self._done.items() if name in found}
        for name, state in sorted(found.items()):
            is_still = last is None or last.get(name) == state
            if is_still and self._done.get(name) != state:
                self._done[name] = state
                told.append(self._take(name))
        return told

    def _found(self) -> Iterator[tuple[str, State]]:
        for place in self._folder.iterdir():
            try:
                folder = adapter_folder(place)
            except UserError:
                continue  # not an adapter
            yield place.name, (_state(folder / CONFIG), _state(folder / WEIGHTS))

    def _take(self, name: str) -> str:
        """Serve an adapter or, if it is invalid, keep the previous one. Returns what to log."""
        adapted, engine = adapted_name(self._served.name, name), self._served.engine
        try:
            with memory_told("serve.max_batch_size", engine.max_batch_size):
                packed = pack_adapter(engine, self._base, self._folder / name)
        except (UserError, RunFailed, OSError) as error:
            stays = "; the previous one stays" if name in self._names else ""
            return f"{adapted} is not served: {error}{stays}"
        self._served.put(name, packed)
        self._names.add(name)
        return f"{adapted} is served"


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
