"""A run whose home is an object store: made in a folder on this node, published as it trains.

The store is the truth: before a run starts, the folder here is made equal to what is there. While
it trains, checkpoints are published whole, manifest last, after the rows that they rely on; then
the best model and everything else that has changed. A checkpoint that was not published when the
machine was lost is trained again, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptray.config import Config, RunFailed, UserError
from gptray.files import CannotWrite, is_uri, remove, storing
from gptray.jobs.cluster_nodes import alive_nodes
from gptray.jobs.run_folder import held, run_dir, seen_at
from gptray.lease import Lease, leased
from gptray.manifest import FORMAT, MANIFEST, files_damage
from gptray.record import EVENTS, METRICS
from gptray.remote_folder import RemoteFolder, StoredFile
from gptray.training.checkpoint import checkpoint_step, find_checkpoints

log = logging.getLogger("gptray")

_LEASES = ".gptray"
# What the store held when a run was brought here, by the run's folder.
_brought: dict[Path, dict[str, StoredFile]] = {}


def bring_run(config: Config) -> None:
    """Make the folder of a resolved config's run equal to its home, if that is an object store.

    Raises:
        UserError: the store cannot be read, or a process here trains the run.
        RunFailed: there is no room.
    """
    if not is_uri(config.storage_path):
        return
    folder, home = run_dir(config), RemoteFolder(seen_at(config))
    try:
        there = _listed(home)
    except UserError as error:
        raise UserError(f"storage_path: {error}") from None
    checkpoints = {name.partition("/")[0] for name in there if _is_manifest(name)}
    others = {name for name in there if not _is_of_checkpoint(name) and name != _MODEL_MANIFEST}
    with held(folder):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            is_there = name in others or name.partition("/")[0] in checkpoints
            if path.is_file() and name[0] != "." and not is_there:
                remove(path)
        for path in find_checkpoints(folder):
            if path.name not in checkpoints:
                remove(path)
        for name in sorted(checkpoints):
            _bring_checkpoint(home / name, folder / name, there)
        for name in others:
            home.download(name, folder / name)
    _brought[folder] = there


_MODEL_MANIFEST = f"model/{MANIFEST}"


def _is_of_checkpoint(name: str) -> bool:
    return checkpoint_step(Path(name.partition("/")[0])) is not None


def _is_manifest(name: str) -> bool:
    """Whether it is the manifest of a checkpoint, which is there once the others are."""
    return _is_of_checkpoint(name) and name.partition("/")[2] == MANIFEST


def _listed(home: RemoteFolder) -> dict[str, StoredFile]:
    files = home.files(deep=True)
    return {name: one for name, one in files.items() if name[0] != "."}


def _bring_checkpoint(place: RemoteFolder, folder: Path, there: dict[str, StoredFile]) -> None:
    manifest = place.read(MANIFEST)
    with suppress(OSError):
        if (folder / MANIFEST).read_bytes() == manifest and not files_damage(folder, needed=()):
            return
    log.info("fetching %s", place)
    draft = folder.with_name(f".{folder.name}.tmp")
    with storing(folder):
        remove(draft)
        for name in there:
            top, _, below = name.partition("/")
            if top == folder.name:
                place.download(below, draft / below)
        remove(folder)
        os.rename(draft, folder)


@contextmanager
def publishing(config: Config, folder: Path) -> Iterator[Callable[[], None]]:
    """Publish a run while the block runs, if its home is an object store.

    Yields what has all changes published soon; at the end they are. Others cannot write there.

    Raises:
        UserError: another job trains the run, or the store cannot be written.
        RunFailed: at the end, the store cannot be written; or another job has changed the run.
    """
    if not is_uri(config.storage_path):
        yield lambda: None
        return
    home = RemoteFolder(seen_at(config))
    with leased(home / _LEASES, busy=f"another job is training the run {home}") as lease:
        if _listed(home) != _brought.pop(folder):
            raise RunFailed(f"another job has just changed {home}; run the same command again")
        publisher = Publisher(home, folder, lease)
        thread = threading.Thread(target=publisher.follow, name="publisher", daemon=True)
        thread.start()
        try:
            yield publisher.wake
        except BaseException:
            with suppress(RunFailed):
                publisher.publish()
            raise
        else:
            publisher.publish()
        finally:
            publisher.end()


class Publisher:
    """Copies what changes in a run's folder to its home."""

    def __init__(self, home: RemoteFolder, folder: Path, lease: Lease) -> None:
        self._home, self._folder, self._lease = home, folder, lease
        self._sent: dict[str, object] = {}
        self._guard, self._wanted, self._ended = threading.Lock(), threading.Event(), False

    def wake(self) -> None:
        """Publish soon, in a thread: training does not wait for it."""
        self._wanted.set()

    def end(self) -> None:
        self._ended = True
        self._wanted.set()

    def follow(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended:
                return
            try:
                self.publish()
            except RunFailed as error:
                log.warning("not published yet: %s", error)

    def publish(self) -> None:
        """Publish all that has changed. Raises RunFailed."""
        with self._guard:
            self._lease.check()
            checkpoints = {one.name: one for one in find_checkpoints(self._folder)}
            new = {
                name: manifest
                for name, one in sorted(checkpoints.items())
                if (manifest := self._send_checkpoint(one)) is not None
            }
            for path in (*sorted(self._folder.glob("*.yaml")), *map(self._path, (METRICS, EVENTS))):
                self._send(path)
            for name, manifest in new.items():
                (self._home / name).write(MANIFEST, manifest)
                self._sent[name] = manifest
            self._send_model()
            for path in sorted(self._folder.rglob("*")):
                top = path.relative_to(self._folder).parts[0]
                if path.is_file() and top[0] != "." and top not in (*checkpoints, "model"):
                    self._send(path)
            for name in self._home.folders():
                if checkpoint_step(Path(name)) is not None and not self._path(name).exists():
                    (self._home / name).remove(MANIFEST)
                    (self._home / name).remove_all()

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _send_checkpoint(self, folder: Path) -> bytes | None:
        """Upload a checkpoint but for its manifest, which is returned; None: nothing to do."""
        try:
            manifest = (folder / MANIFEST).read_bytes()
            if folder.name not in self._sent:
                self._sent[folder.name] = (self._home / folder.name).read(MANIFEST)
            if manifest == self._sent[folder.name]:
                return None
            for name in json.loads(manifest)["files"]:
                (self._home / folder.name).upload(folder / name, name)
        except (FileNotFoundError, CannotWrite):
            if folder.exists():
                raise
            return None  # pruned meanwhile
        return manifest

    def _send(self, path: Path) -> None:
        """Upload a file if it has changed since the last time."""
        with suppress(FileNotFoundError):
            version = _version(path)
            name = path.relative_to(self._folder).as_posix()
            if self._sent.get(name) != version:
                self._home.write(name, path.read_bytes())
                self._sent[name] = version

    def _send_model(self) -> None:
        """Publish the best model, its weights last but for the manifest."""
        model = self._path("model")
        if not model.is_dir():
            return
        paths = [path for path in model.iterdir() if path.name[0] != "."]
        versions = {path.name: _version(path) for path in paths}
        if self._sent.get("model") == versions:
            return
        contents = {path.name: path.read_bytes() for path in paths}
        files = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(contents.items())
        }
        place = self._home / "model"
        for name in sorted(contents, key=lambda name: name.endswith(".safetensors")):
            place.write(name, contents[name])
        place.write(MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        self._sent["model"] = versions


def _version(path: Path) -> tuple[int, int, int]:
    """What changes with a file's content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_one_node(config: Config) -> None:
    """Refuse to make a run of an object store on several nodes. Needs Ray. Raises UserError."""
    if is_uri(config.storage_path) and len(alive_nodes()) > 1:
        raise UserError(
            f"storage_path={config.storage_path}: object storage is the home of runs on one node; "
            "on a cluster of several give a folder that all nodes see, such as NFS (text, prompts, "
            "models and generate.output_path may lie in object storage)"
        )
