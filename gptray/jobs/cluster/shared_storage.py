"""Checks that all nodes share the storage, before anything expensive.

Every node that will work must read back a token that the driver writes to the folder, and be able
to write there. What a job only reads, a model or a text, must look the same there as here. An
object store must answer each node.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from gptray.config import Config, RunFailed, UserError
from gptray.jobs.cluster.cluster_nodes import NoAnswer, alive_nodes, ask
from gptray.jobs.cluster.own_code import own_code
from gptray.storage.files import (
    check_writable,
    expanded,
    is_uri,
    no_empty_folders,
    open_regular,
    storing,
)
from gptray.storage.remote_folder import RemoteFolder

log = logging.getLogger("gptray")

# How long a network file system may take to show a new file on other nodes.
SETTLE_S, POLL_S = 3.0, 0.2
# Bytes of a file, and files of a folder or a text, that suffice to tell one from another.
_START_BYTES, _MOST_FILES = 64, 100
_OTHER_CODE = (
    "has another gptray than the one that runs this job; install the same one on every node, or "
    "start the job with ray job submit --working-dir"
)
_REMEDY = "give a {noun} that all nodes share, such as NFS"


@dataclass(frozen=True)
class Looks:
    """A file's size and first bytes, which a node must find."""

    size: int
    start: bytes


@dataclass(frozen=True)
class Place:
    """A path that all nodes must see, and the files to compare.

    words: the path as the user names it, such as storage_path=/x. noun: file or folder.
    """

    words: str
    path: Path
    noun: str
    is_written: bool
    files: tuple[tuple[Path, Looks], ...]


def check_shared(
    *,
    written: Mapping[str, Path] | None = None,
    read: Mapping[str, Sequence[Path]] | None = None,
    stores: Sequence[str] = (),
    use_gpu: bool = False,
) -> None:
    """Raise UserError if a node with workers does not see a path or has another gptray than this.

    RunFailed for a silent node. Needs Ray.

    written: folders by how the user names them, such as storage_path=/x; they are created if
    needed, and nothing is left behind. read: files and folders by key. stores: object stores that
    must answer, as the user names them. use_gpu: whether only nodes with GPUs will work.
    """
    found = blind_nodes(written=written, read=read, stores=stores, use_gpu=use_gpu)
    if found:
        has_looked = any(isinstance(one, UserError) for one in found)
        message = "\n".join(dict.fromkeys(map(str, found)))
        raise UserError(message) if has_looked else RunFailed(message)


def check_shared_by_training(config: Config, folder: Path) -> None:
    """Refuse paths that workers of a run or sweep would not see. Raises like `check_shared`."""
    init_from = [config.model.init_from] if config.model.init_from else []
    read = {"model.init_from": init_from, "train.teachers": config.train.teachers}
    paths = {key: [expanded(one) for one in models] for key, models in read.items()}
    check_shared_by_job(config, folder, read=paths)


def check_shared_by_job(
    config: Config, folder: Path, *, read: Mapping[str, Sequence[Path]]
) -> None:
    """Like `check_shared`, for a job that writes to a folder of storage_path, or to its store."""
    words = f"storage_path={config.storage_path}"
    in_store = is_uri(config.storage_path)
    check_shared(
        written={} if in_store else {words: folder},
        read=read,
        stores=[words] if in_store else [],
        use_gpu=config.compute.use_gpu,
    )


def check_seen(folder: Path, *, storage_path: str) -> None:
    """In a worker: raise UserError if its node, which may have joined later, does not see a folder.

    The message names storage_path and the node.
    """
    if not folder.is_dir():
        node = ray.util.get_node_ip_address()
        remedy = _REMEDY.format(noun="folder")
        raise UserError(f"storage_path={storage_path}: node {node} does not see {folder}; {remedy}")


def blind_nodes(
    *,
    written: Mapping[str, Path] | None = None,
    read: Mapping[str, Sequence[Path]] | None = None,
    stores: Sequence[str] = (),
    use_gpu: bool = False,
) -> list[UserError | RunFailed]:
    """A UserError for each node with workers that has another gptray, or does not see a path.

    It names the first such path. A RunFailed for each that did not answer.
    """
    nodes = alive_nodes()
    working = [node for node in nodes if (node.gpus if use_gpu else node.cpus)]
    if len(nodes) < 2 or not working:
        return []
    with ExitStack() as stack:
        places = [stack.enter_context(_token(*place)) for place in (written or {}).items()]
        for key, paths in (read or {}).items():
            places += [_as_here(key, path) for path in paths[:_MOST_FILES] if path.exists()]
        about = ", ".join([*(place.words for place in places), *stores][:2])
        answers = ask(working, problem_of, places, stores, own_code(), about=about)
    found: list[UserError | RunFailed] = []
    for node, answer in zip(working, answers, strict=True):
        if isinstance(answer, NoAnswer):
            words = f"node {node.address} {answer.reason} when asked whether it sees {about}"
            if answer.is_gone:
                log.warning("%s; it has left the cluster", words)
            else:
                found.append(RunFailed(words))
        elif answer:
            words, problem = answer
            found.append(UserError(f"{words}: node {node.address} {problem}"))
    return found


def problem_of(
    places: Sequence[Place], stores: Sequence[str] = (), code: str = ""
) -> tuple[str, str] | None:
    """On a node: the first thing that is not as on the driver, and what is wrong with it.

    code: the driver's `own_code`; "": any will do.
    """
    if code and code != own_code():
        return "gptray", _OTHER_CODE
    for place in places:
        if problem := _unseen(place) or _unwritable(place):
            return place.words, problem
    for words in stores:
        uri = words.partition("=")[2]
        try:
            RemoteFolder(uri).folders()
        except UserError as error:
            return words, str(error).removeprefix(f"{uri}: ")
    return None


def _unseen(place: Place) -> str | None:
    deadline = time.monotonic() + SETTLE_S
    for path, expected in place.files:
        while (found := _look_again(path)) != expected:
            if isinstance(found, str):
                return f"cannot read this {place.noun}: {found}"
            if time.monotonic() > deadline:
                sees = "sees another file in place of" if found else "does not see"
                return f"{sees} this {place.noun}; {_REMEDY.format(noun=place.noun)}"
            time.sleep(POLL_S)
    return None


def _look_again(path: Path) -> Looks | str | None:
    """Like `_look`; None if there is nothing, and the reason for any other error."""
    try:
        return _look(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror or str(error)


def _unwritable(place: Place) -> str | None:
    if not place.is_written:
        return None
    try:
        check_writable(place.path, key="")
    except UserError as error:
        return f"sees this folder, but {str(error).removeprefix(': ')}"
    return None


@contextmanager
def _token(words: str, folder: Path) -> Iterator[Place]:
    """Put a file with unique content into a folder while the block runs."""
    path = folder / f".gptray-{secrets.token_hex(8)}.token"
    with no_empty_folders(folder):
        try:
            with storing(path):
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(secrets.token_hex(16), "utf-8")
            yield Place(words, folder, "folder", True, ((path, _look(path)),))
        finally:
            with storing(path):
                path.unlink(missing_ok=True)


def _as_here(key: str, path: Path) -> Place:
    """A file, or a folder's own files, as they look on this node."""
    noun, files = "file", [path]
    if path.is_dir():
        noun = "folder"
        files = [one for one in sorted(path.iterdir()) if one.is_file() and one.name[0] != "."]
    looks = tuple((one, _look(one)) for one in files[:_MOST_FILES])
    return Place(f"{key}={path}", path, noun, False, looks)


def _look(path: Path) -> Looks:
    """Size and start of a file. Raises OSError."""
    with open_regular(path) as file:
        return Looks(os.fstat(file.fileno()).st_size, file.read(_START_BYTES) or b"")
