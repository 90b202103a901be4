"""A run's folder at the driver, for workers on nodes that do not see it; see `driver_folder`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptray.config import Config, RunFailed
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.tasks import result_of
from gptray.jobs.folders.driver_folder import BLOCK_BYTES, DriverFolder, Writer
from gptray.storage.files import cached_as, is_uri, replacing, storing
from gptray.storage.node_cache import hold
from gptray.storage.remote_folder import StoredFile
from gptray.wording import first_line


@dataclass(frozen=True)
class Origin:
    """Where workers find the driver's folder of a run or a sweep.

    actor: the name of its `DriverFolder`. node: Ray's id of the driver's node. storage_path: the
    object store.
    """

    actor: str
    node: str
    root: Path
    storage_path: str

    def call(self, method: str, *arguments: object) -> object:
        """Call a method of the actor. Raises its UserError or RunFailed, or RunFailed if gone."""
        try:
            answer: object = ray.get(_actor(self.actor).call.remote(method, *arguments))
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
            ValueError,  # no actor of that name
        ) as error:
            why = why_ended(error, otherwise=first_line(error))
            raise RunFailed(
                f"the driver's node does not answer: {why}; the same command resumes"
            ) from error
        return result_of(answer)

    @property
    def is_here(self) -> bool:
        """Whether this is the driver's node."""
        return bool(ray.get_runtime_context().get_node_id() == self.node)

    def folder_here(self, run_dir: Path) -> Path:
        """This node's folder for a run that is in `run_dir` on the driver's node.

        On other nodes it is in the cache, and kept while this process lives.
        """
        if self.is_here:
            return run_dir
        # With the node's id, since nodes may share a home folder.
        text = f"{ray.get_runtime_context().get_node_id()} {self.root}"
        folder = cached_as("nodes", text)
        hold(folder)
        return folder / self.root.name / self.name_of(run_dir)

    def name_of(self, run_dir: Path) -> str:
        """The path of a run's folder below the root; "" for the root itself."""
        name = run_dir.relative_to(self.root).as_posix()
        return "" if name == "." else name


@cache
def _actor(name: str) -> ActorHandle[DriverFolder]:
    return ray.get_actor(name)


@contextmanager
def reachable(config: Config, folder: Path) -> Iterator[Origin | None]:
    """Make a job's folder reachable from other nodes while the block runs. Needs Ray.

    Yields None if that is not needed: the nodes share the storage_path, or there is only one.
    """
    if not is_uri(config.storage_path) or is_own_ray():
        yield None
        return
    node = ray.get_runtime_context().get_node_id()
    name = f"gptray-folder-{secrets.token_hex(8)}"
    actor = (
        ray.remote(DriverFolder)
        .options(
            name=name,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(folder)
    )
    try:
        yield Origin(name, node, folder, config.storage_path)
    finally:
        ray.kill(actor)


@dataclass(frozen=True)
class FolderAtDriver:
    """A run's folder at the driver, or a folder in it, as a `Home`. name: below the origin's root.

    call: `Origin.call`. All methods that write raise RunFailed.
    """

    call: Callable[..., object]
    writer: Writer
    name: str

    def __truediv__(self, name: str) -> FolderAtDriver:
        return replace(self, name=self._name(name))

    def __str__(self) -> str:
        return f"{self.name or 'the run'} from the driver's node"

    def _name(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name

    def files(self, *, deep: bool = False) -> dict[str, StoredFile]:
        """All files of the run, including those in its folders."""
        assert deep
        sizes = self.call("files", self.name)
        assert isinstance(sizes, dict)
        return {name: StoredFile(name, size, 0) for name, size in sizes.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        return self._block(name, 0)

    def download(self, name: str, target: Path) -> None:
        """Copy a file from the driver; it appears atomically."""
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as draft, draft.open("wb") as file:
                while block := self._block(name, file.tell()):
                    file.write(block)

    def _block(self, name: str, offset: int) -> bytes | None:
        block = self.call("read", self._name(name), offset)
        assert block is None or isinstance(block, bytes)
        return block

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file at the driver; it appears atomically."""
        self._put(BytesIO(content), name)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file to the driver; it appears atomically."""
        with source.open("rb") as file:
            self._put(file, name)

    def _put(self, file: BinaryIO, name: str) -> None:
        offset, block = 0, file.read(BLOCK_BYTES)
        is_last = False
        while not is_last:
            following = file.read(BLOCK_BYTES)
            is_last = not following
            self.call("put", self.writer, self._name(name), offset, block, is_last)
            offset, block = offset + len(block), following

    def append(self, name: str, offset: int, block: bytes) -> None:
        """Append to a file that has `offset` bytes."""
        self.call("append", self.writer, self._name(name), offset, block)

    def append_events(self, lines: bytes) -> None:
        """Append events to the run's."""
        self.call("append_events", self.writer, lines)

    def remove(self, name: str) -> None:
        """Do nothing: folders are removed as a whole, see `remove_all`."""

    def remove_all(self) -> None:
        """Remove the folder."""
        self.call("remove_all", self.writer, self.name)
