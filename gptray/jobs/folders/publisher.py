"""Copies a run's or a sweep's local folder to its home in an object store.

The home never records what it does not have yet: a checkpoint's manifest comes after its files and
the rows that it relies on; a sweep's record plans a trial before any of its files arrives, and says
that the trial has ended after all of them have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from gptray.storage.files import CannotWrite
from gptray.storage.manifest import FORMAT, MANIFEST
from gptray.storage.record import EVENTS, METRICS
from gptray.storage.remote_folder import StoredFile
from gptray.training.checkpoint import checkpoint_step, find_checkpoints
from gptray.tuning.sweep_record import TRIALS, trial_dir

_MODEL = "model"
# Events of a sweep's record that rely on its trials' files.
_LATE = ("ended", "winner")
# A file's size, modification time and inode, which change with its content.
Version = tuple[int, int, int]


@dataclass
class Sent:
    """The local files, by local path, that a home has.

    checkpoints: their manifests; None for one that is incomplete in the home or not local.
    """

    files: dict[Path, Version] = field(default_factory=dict)
    checkpoints: dict[Path, bytes | None] = field(default_factory=dict)


def version_of(path: Path) -> Version:
    """A value that changes with a file's content. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def is_hidden(name: str) -> bool:
    """Whether a file is a lock, a draft or a lease rather than part of a run."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


class Home(Protocol):
    """A remote folder with files by name: in an object store, or on the driver's node.

    Its methods are those of `RemoteFolder`.
    """

    def __truediv__(self, name: str) -> Home: ...
    def files(self, *, deep: bool = False) -> Mapping[str, StoredFile]: ...
    def read(self, name: str) -> bytes | None: ...
    def download(self, name: str, target: Path) -> None: ...
    def write(self, name: str, content: bytes) -> None: ...
    def upload(self, source: Path, name: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def remove_all(self) -> None: ...


class _FolderPublisher:
    """A local folder, and the home that its files are sent to."""

    def __init__(self, home: Home, folder: Path, sent: Sent) -> None:
        self._home, self._folder, self._sent = home, folder, sent

    def _send(self, *paths: Path) -> None:
        """Upload the files that have changed since the last time."""
        for path in paths:
            with suppress(FileNotFoundError):
                version = version_of(path)
                if self._sent.files.get(path) != version:
                    self._write(path)
                    self._sent.files[path] = version

    def _write(self, path: Path) -> None:
        self._home.write(self._name(path), path.read_bytes())

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _send_model(self) -> None:
        """Publish the best model: first its other files, then weights, then the manifest."""
        model = self._folder / _MODEL
        if not model.is_dir():
            return
        versions = {path: version_of(path) for path in model.iterdir() if path.name[0] != "."}
        if versions.items() <= self._sent.files.items():
            return
        contents = {path.name: path.read_bytes() for path in versions}
        files = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(contents.items())
        }
        place = self._home / _MODEL
        for name in sorted(contents, key=lambda name: name.endswith(".safetensors")):
            place.write(name, contents[name])
        place.write(MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        self._sent.files.update(versions)

    def _send_rest(self, but: Collection[str]) -> None:
        """Upload all other files, except those named in `but`.

        Also leaves out checkpoints, even those written meanwhile: their manifests must come last.
        """
        for path in sorted(self._folder.rglob("*")):
            name = self._name(path)
            first = name.partition("/")[0]
            if first in but or checkpoint_step(Path(first)) is not None:
                continue
            if not is_hidden(name) and path.is_file():
                self._send(path)


class RunPublisher(_FolderPublisher):
    """Copies changes in a run's folder to its home."""

    def publish(self) -> None:
        """Publish all changes. Raises CannotWrite, or UserError if the home cannot be read."""
        new = self._send_checkpoints()
        self._send(*sorted(self._folder.glob("*.yaml")), self._folder / METRICS)
        self._send(self._folder / EVENTS)
        for one, manifest in new.items():
            (self._home / one.name).write(MANIFEST, manifest)
            self._sent.checkpoints[one] = manifest
        self._send_model()
        self._send_rest({_MODEL})
        self._remove_pruned()

    def _send_checkpoints(self) -> dict[Path, bytes]:
        """Upload new checkpoints except for their manifests, which are returned.

        If all are pruned meanwhile, takes the next ones, since rows must not arrive without any.
        """
        while checkpoints := sorted(find_checkpoints(self._folder)):
            sent = {one: self._send_checkpoint(one) for one in checkpoints}
            new = {one: manifest for one, manifest in sent.items() if manifest is not None}
            if new or any(one.exists() for one in checkpoints):
                return new
        return {}

    def _remove_pruned(self) -> None:
        """Remove locally pruned checkpoints from the home, once it has a complete other one."""
        own = {
            one: sent for one, sent in self._sent.checkpoints.items() if one.parent == self._folder
        }
        if not any(one.exists() for one, manifest in own.items() if manifest):
            return
        for one in own:
            if not one.exists():
                (self._home / one.name).remove(MANIFEST)
                (self._home / one.name).remove_all()
                del self._sent.checkpoints[one]

    def _send_checkpoint(self, folder: Path) -> bytes | None:
        """Upload a checkpoint except for its manifest, which is returned; None: nothing to do."""
        place, sent = self._home / folder.name, self._sent.checkpoints
        try:
            manifest = (folder / MANIFEST).read_bytes()
            if folder not in sent:
                sent[folder] = place.read(MANIFEST)
            if manifest == sent[folder]:
                return None
            for name in json.loads(manifest)["files"]:
                place.upload(folder / name, name)
        except (FileNotFoundError, CannotWrite):
            if folder.exists():
                raise
            return None  # pruned meanwhile
        return manifest


class SweepPublisher(_FolderPublisher):
    """Copies changes in a sweep's folder to its home."""

    def __init__(self, home: Home, folder: Path, sent: Sent) -> None:
        super().__init__(home, folder, sent)
        self._trials: dict[str, RunPublisher] = {}
        self._recorded = self._record()

    def publish(self) -> None:
        """Publish all changes. Raises like `RunPublisher.publish`."""
        self._send(*sorted(self._folder.glob("config*.yaml")))
        record = self._record()
        new = record.removeprefix(self._recorded).splitlines(keepends=True)
        early = [line for line in new if json.loads(line)["event"] not in _LATE]
        if early:
            self._home.write(TRIALS, self._recorded + b"".join(early))
        lines = [json.loads(line) for line in record.splitlines()]
        for name in [line["trial"] for line in lines if line["event"] == "planned"]:
            if trial_dir(self._folder, name).is_dir():
                self._publisher(name).publish()
        self._send_model()
        self._send_rest({_MODEL, "trials", TRIALS})
        if record != self._recorded:
            self._home.write(TRIALS, record)
            self._recorded = record

    def _publisher(self, name: str) -> RunPublisher:
        if name not in self._trials:
            home = self._home / "trials" / name
            self._trials[name] = RunPublisher(home, trial_dir(self._folder, name), self._sent)
        return self._trials[name]

    def _record(self) -> bytes:
        """The complete lines of the sweep's record."""
        try:
            record = (self._folder / TRIALS).read_bytes()
        except FileNotFoundError:
            return b""
        return record[: record.rfind(b"\n") + 1]
