"""Atomic writes, messages for full disks and lost mounts, safe opening, and digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from urllib.parse import unquote

from safetensors import SafetensorError

from gptray.config import RunFailed, UserError
from gptray.storage.path_mistakes import uri_slip

# Errors that more space would solve: a full disk, a quota, a limit on a file's size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LINK = "it is a link, and links are not followed"
_LOCAL = "file://"
# The longest path within a run.
_LONGEST_BELOW = 256
# Other errors of failing storage: read-only, broken, a lost mount.
_LOST = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.EHOSTDOWN)


class CannotWrite(RunFailed):
    """Storage that cannot be written; it may recover, and the same command then resumes."""


def absolute(path: str | Path, *, key: str | None = None) -> Path:
    """As `expanded`, but absolute and without `..`; keeps links. Raises UserError."""
    return Path(os.path.abspath(expanded(path, key=key)))


def is_uri(text: object) -> bool:
    """Whether it is a URI of a file system other than this machine's."""
    return isinstance(text, str) and "://" in text and not text.startswith(_LOCAL)


def expanded(path: str | Path, *, key: str | None = None) -> Path:
    """A path with ~ or ~user expanded to the home folder, or the path of a file:// URI.

    key: the config's key for it, for the message.

    Raises UserError if no home folder is known, or the URI names another machine.
    """
    text, named = os.path.expanduser(path), f"{key}={path}" if key else path
    if text.startswith(f"{_LOCAL}/"):
        return Path(unquote(text.removeprefix(_LOCAL)))
    if text.startswith(_LOCAL):
        raise UserError(f"{named}: a path follows file:// from its root, as in file:///home/me")
    if text.startswith("~"):
        user = text.partition(os.sep)[0]
        raise UserError(f"{named}: no home folder is known for {user}; give the whole path")
    return Path(text)


def cache_folder() -> Path:
    """This user's cache, for what can be made or fetched again."""
    given = expanded(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG standard ignores a relative path, which would be another cache in each directory.
    return (given if given.is_absolute() else expanded("~/.cache")) / "gptray"


def cached_as(kind: str, text: str) -> Path:
    """The cache's folder for an entry of a kind that `text` identifies."""
    return cache_folder() / kind / hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn errors of writing to `path` (a full disk, a lost mount, a quota) into CannotWrite.

    The message names the path, the reason and the bytes that are free there.
    """
    try:
        yield
    except Exception as error:
        if not is_file_error(error):
            raise
        raise cannot_write(path, error) from error


def is_file_error(error: Exception) -> bool:
    """Whether an error is about files: from the system, or from a library that writes them.

    Timeouts and lost connections are OSErrors too; those from Ray's calls have no errno.
    """
    if isinstance(error, (TimeoutError, ConnectionError)):
        return error.errno is not None
    return isinstance(error, (OSError, SafetensorError))


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """The error for a failure to write to `path`; names the actual file if it is known."""
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(named, (str, bytes)):
        named = Path(os.fsdecode(named))
        path = path if _is_hidden_below(named, path) else named
    number = getattr(error, "errno", None)
    is_full = number in _FULL or any(os.strerror(one) in str(error) for one in _FULL)
    remedy = "once there is room" if is_full else "once it can be written"
    return CannotWrite(
        f"cannot write {path}: {_reason(error)} ({_free_space(path)}); the same command resumes "
        f"{remedy}"
    )


def is_storage(error: OSError) -> bool:
    """Whether an error is the storage's, not that of a wrong path."""
    return error.errno in (*_FULL, *_LOST)


def _is_hidden_below(named: Path, path: Path) -> bool:
    """Whether `named` is a hidden draft in `path`'s folder, whose name means nothing to users."""
    if path.parent not in named.parents:
        return False
    return any(part.startswith(".") for part in named.relative_to(path.parent).parts)


def _reason(error: Exception) -> str:
    """The reason in a few words; shutil.Error lists (source, target, reason) for each file."""
    text = str(error)
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        text = str(error.args[0][0][-1])
    # safetensors and pyarrow wrap the system's reason in their own words.
    known = [os.strerror(one) for one in (*_FULL, *_LOST)]
    words = next((one for one in known if one in text), None)
    return words or getattr(error, "strerror", None) or text


def _free_space(path: Path) -> str:
    try:
        there = next((one for one in (path, *path.parents) if one.exists()), None)
        return f"{shutil.disk_usage(there or '/').free:,} bytes free"
    except OSError:
        return "the free space on the disk is unknown"


def check_writable(folder: Path, *, key: str) -> None:
    """Raise UserError if a folder cannot be written or created; leaves nothing behind.

    key: the key or variable that names the folder.
    """
    try:
        there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
        if not there.is_dir():
            what = "not a folder" if there.exists() else "a broken link"
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is {what}")
        for part in folder.relative_to(there).parts:
            if part.startswith("$"):
                raise UserError(f"{key}: {part} is not expanded here; write ~ or the whole path")
            if slip := uri_slip(part):
                raise UserError(f"{key}: {slip}")
            if len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, f"the name {part[:40]}... is too long")
        if len(os.fsencode(folder)) > os.pathconf(there, "PC_PATH_MAX") - _LONGEST_BELOW:
            raise OSError(errno.ENAMETOOLONG, "the path is too long")
        Path(tempfile.mkdtemp(prefix=".gptray-", suffix=".probe", dir=there)).rmdir()
    except OSError as error:
        if error.errno in _FULL:
            return  # space may be freed before it is needed
        raise UserError(f"{key}: {folder} cannot be written: {_reason(error)}") from None


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """After the block, remove the folder and those parents that it created and left empty."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # the first that is not empty; a lost mount was reported already
            for one in made:
                one.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` if the block succeeds."""
    # A uuid, because containers that share a folder may share process ids too.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes its files private
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # a lost mount was reported already
            partial.unlink(missing_ok=True)


def append(path: Path, data: bytes, *, cut_torn: bool = False, sync: bool = False) -> None:
    """Append `data` to a file: all of it or, if the disk is full, nothing. Locks out other writers.

    cut_torn: first drop an incomplete last line, which a crash of the machine may leave.
    sync: flush to disk.

    Raises OSError.
    """
    with open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if cut_torn:
            size = _whole_lines(path, size)
            file.truncate(size)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def open_lock(path: Path) -> FileIO:
    """Open a lock file, creating it if needed; refuses links. Raises OSError."""
    return open_regular(path, os.O_RDWR | os.O_CREAT)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> FileIO:
    """Open a regular file; for writing, refuse a link, which would write another file.

    Raises OSError, also for a folder, and for a pipe or device, which may block or never end.
    """
    reads = flags & os.O_ACCMODE == os.O_RDONLY
    flags |= 0 if reads else os.O_NOFOLLOW
    try:
        # O_NONBLOCK, or this would wait for the other end of a pipe.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and not reads:
            raise OSError(errno.ELOOP, _LINK, str(path)) from None
        raise
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return FileIO(descriptor, "rb" if reads else "rb+")


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a whole folder, if it exists.

    Raises OSError; FileExistsError for anything else, such as a named pipe.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        raise FileExistsError(errno.EEXIST, "it is neither a file nor a folder", str(path))


def refuse_links(folder: Path, names: Iterable[str], *, what: str) -> None:
    """Raise UserError if one of `names` in a folder, to which a job writes, is a link.

    what: who would write, for the message.
    """
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, and {what} would write through it; "
                "replace the link with the file or folder itself, or choose another name"
            )


def _whole_lines(path: Path, size: int) -> int:
    """The size of a file up to the end of its last complete line."""
    with path.open("rb") as file:
        if size:
            file.seek(-1, os.SEEK_END)
        if not size or file.read(1) == b"\n":
            return size
        file.seek(0)
        return file.read().rfind(b"\n") + 1


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file, in hexadecimal. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
